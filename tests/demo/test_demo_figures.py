"""The paper's figures, which the page has as examples of one click."""

from __future__ import annotations

import base64
import json
import re

import pytest
import torch
from served_page import CONTROLS

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")


from llava.demo.conversation.desk import Desk
from llava.demo.conversation.talk import Talk
from llava.demo.examples import EXAMPLES
from llava.demo.handlers import Handlers


def test_the_papers_figures(desk: Desk):
    """1, 2, 5 and 11 to 14: each shows what its hint says, and the answer is the same with fewer tokens."""
    assert re.findall(r"\d+", " ".join(example.label for example in EXAMPLES)) == [
        "1",
        "2",
        "5",
        "11",
        "12",
        "13",
        "14",
    ]
    said = []
    for example in EXAMPLES:
        talk, handlers = Talk(), Handlers(desk)
        shown = json.loads(handlers.example(talk, example, *CONTROLS)["picture"])
        attention = torch.tensor(shown["data"]["tiles"][0]["attention"])
        decides = attention[shown["data"]["layer"]]
        assert (decides < decides.mean() / 5).float().mean() > 0.6  # 2, 11: most patches get next to nothing
        first, last = (layer.topk(14).values.sum() / layer.sum() for layer in (attention[0], decides))
        assert last > first + 0.2  # 5, 12, 13: it gathers on a tenth of the patches
        list(handlers.ask(talk, example.question, *CONTROLS, 1, 0))
        answers = talk.exchanges[0].answers
        assert answers["vanilla"].turn.text == answers["zipped"].turn.text
        said.append(answers["zipped"].turn.text)
    assert said == ["yellow", "K", "L", "left", "yes", "bricked"]


def test_the_figure_of_misalignment(desk: Desk, talk: Talk):
    """Figure 14: what a patch attends to most is elsewhere and kept, as the example's hint says."""
    example = EXAMPLES[-1]
    data = json.loads(Handlers(desk).example(talk, example, *CONTROLS)["picture"])
    assert data["view"] == example.view == "pairs" and data["hint"] == example.hint
    (tile,) = data["data"]["tiles"]
    shares = torch.frombuffer(bytearray(base64.b64decode(tile["pairs"])), dtype=torch.uint8).view(144, 144)
    most = shares.argmax(dim=1)
    assert {tile["role"][patch] for patch in most} == {"kept"} and tile["role"].count("kept") == 26
    assert (most == torch.arange(144)).float().mean() < 0.05

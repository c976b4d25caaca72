"""The page's controls, and what its command says before a model is loaded."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from served_page import free_port

from llava.cli import main

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")


from llava.demo.conversation.desk import Desk
from llava.demo.conversation.setting import Setting
from llava.demo.conversation.talk import Talk
from llava.demo.handlers import Handlers
from llava.demo.models.llava_model import LlavaModel
from visionzip import unzip, visionzip


@pytest.mark.parametrize(
    ("controls", "problem"),
    [
        (("zip", "tokens", 32), "'zip' is unknown: use one of visionzip"),
        (("visionzip", "words", 32), "'words' is unknown"),
        (("visionzip", "tokens", 145), "a budget of 145 is outside 1 to 144 tokens"),
        (("visionzip", "percent", 0), "a budget of 0 is outside 1 to 100 percent"),
        (("visionzip", "tokens", None), "a budget of None is outside"),
        (("visionzip", "tokens", 32, "sideways"), "'sideways' is unknown"),
    ],
)
def test_controls_out_of_range(desk: Desk, controls: tuple[Any, ...], problem: str):
    with pytest.raises(ValueError, match=problem):
        Handlers(desk).setting(*controls)


def test_budget_in_tokens_or_percent(desk: Desk):
    assert Handlers(desk).setting("scope", "percent", 25).keep == 0.25
    assert Handlers(desk).setting("visionzip", "tokens", 32.0) == Setting(32)
    assert desk.default == Setting(32)  # 128 of 576, in this model's 144


def test_the_budget_is_kept_in_the_other_unit(desk: Desk, talk: Talk):
    slider = Handlers(desk).limits(talk, "percent", 36)["budget"]
    assert (slider.value, slider.maximum) == (25, 100)
    slider = Handlers(desk).limits(talk, "tokens", 25)["budget"]
    assert (slider.value, slider.maximum) == (36, 144)


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, unread: None
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "llava.demo.page", raising=False)
    assert main(["demo"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.endswith('pip install "llava-visionzip[demo]"\n')


def test_a_taken_port_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture, unread: None):
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), BaseHTTPRequestHandler)
    with server:
        assert main(["demo", "--port", str(server.server_port)]) == 2
    assert "cannot be served on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "unit", "budget", "tokens", "said"),
    [
        ({"keep": 0.25, "max_tokens": 20}, "percent", 50, 20, "visionzip, 50% of the patches, at most 20 tokens"),
        ({"keep": 0.25, "min_tokens": 60}, "percent", 10, 60, "visionzip, 10% of the patches, at least 60 tokens"),
        ({"keep": 0.25, "max_tokens": 20}, "tokens", 30, 30, "visionzip, 30 tokens"),  # a number says all by itself
    ],
)
def test_limits_of_a_checkpoints_own_setting_hold_wherever_the_slider_stands(
    desk: Desk, talk: Talk, own: dict[str, Any], unit: str, budget: int, tokens: int, said: str
):
    begun = Desk(LlavaModel(*replaced(desk, **own)))
    setting = Handlers(begun).setting("visionzip", unit, budget)
    assert str(setting) == said
    assert begun.picture(talk.pictures[0], setting)["tokens"] == [145, tokens]


def replaced(desk: Desk, **own: Any) -> tuple[Any, ...]:
    """The desk's model, with another setting of its own."""
    page_model = desk.page_model
    visionzip(unzip(page_model.model), **own)
    return page_model.tokenizer, page_model.model, page_model.image_processor, page_model.conv_mode

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

"""What connects the page's components to the handlers, such that no message can come in the wrong order.

Two rules hold for that. What writes on the page waits in one line, of which gradio runs the next event only when the
last message of the one before is on its way; and messages of one line arrive in their order. What must not wait there,
such as Stop, writes nothing: its line is written in the browser, at the click. And since such a request may overtake a
question or be overtaken, the browser counts questions and picks, and says up to which one it means.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import torch

from llava.demo.conversation.talk import StoppedError, Talk
from llava.demo.conversation.visitors import Visitors
from llava.demo.drawing import words
from llava.demo.examples import EXAMPLES, Example
from llava.demo.handlers import Change, Handlers

LINE = {"concurrency_id": "model", "concurrency_limit": 1}
AT_ONCE = {"queue": False}
# What each handler changes. The rest is left out, not sent as an update of nothing: gradio keeps a component for each
# of these in a visitor's session.
_CHANGES = {
    "add_images": ("uploads", "picture", "status"),
    "add_videos": ("clips", "picture", "status"),
    "limits": ("budget",),
    "redraw": ("picture", "status"),
    "choose": ("picture", "status"),
    "pick": (),
    "stop": (),
    "leave": (),
    "forget": ("picture", "conversation", "status", "strip"),
    "begin_with": ("picture", "conversation", "status", "strip"),
    "ask": ("conversation", "status"),
    "ask_again": ("conversation", "status"),
    "compare": ("strip", "status"),
}
_STOPPED = "stopped: the conversation is as it was before this question"

# In the browser, at the click. A question's number; and the number of the last pick, which is to be seen before.
_PICKED = "Number(document.querySelector('.vz-picture')?.dataset.picks ?? 0)"
_ASKING = f"(number) => [number + 1, {_PICKED}, `{words.status('waiting for the model …', busy=True, waiting=True)}`]"
_SENDING = (
    f"(status) => [status.includes('vz-busy') ? status : `{words.status('waiting for the model …', waiting=True)}`]"
)
_LEAVING = "(number) => [number + 1, '', '', '', '']"
_STOPPING = (
    f"(status) => [status.includes('vz-busy vz-waiting') ? `{words.status(_STOPPED)}`"
    f" : status.includes('vz-busy') ? `{words.status('stopping …', busy=True)}` : status]"
)
_PICKING = (
    "(status, conversation) => [status.includes('vz-busy') || !conversation.includes('vz-turn') ? status"
    f" : `{words.status('ask again to see what it answers')}`]"
)
# Where an answer came, and nothing else was written meanwhile.
_CLEAR = """(question, status, conversation) => {
  const asked = [...new DOMParser().parseFromString(conversation, 'text/html').querySelectorAll('.vz-question')].at(-1);
  return [status.includes('answered') && asked?.firstChild.textContent === question.trim() ? '' : question];
}"""

logger = logging.getLogger(__name__)


def in_one_line(error: Exception) -> str:
    """An error as a visitor reads it; what nobody foresaw goes to the log too."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory: take a smaller budget, or fewer or smaller images"
    if isinstance(error, ValueError | TypeError | OSError):
        return str(error)
    logger.error("the page failed", exc_info=error)
    return f"{type(error).__name__}: {error}"


class Events:
    """The page's events.

    Args:
        parts: the components by name.
        handlers: what is done.
        visitors: the conversations.
    """

    def __init__(self, parts: dict[str, Any], handlers: Handlers, visitors: Visitors) -> None:
        self.parts, self.handlers, self.visitors = parts, handlers, visitors

    def connect(self) -> None:
        """Connect all of them; inside of the page's blocks."""
        parts, do = self.parts, self.handlers
        controls = self._parts("method", "unit", "budget", "positions", "size_bias")
        self._in_browser(parts["uploads"].upload, _SENDING, ["status"], ["status"])
        self._on(parts["uploads"].upload, do.add_images, [parts["uploads"], *controls], **LINE)
        if "clips" in parts:
            self._in_browser(parts["clips"].upload, _SENDING, ["status"], ["status"])
            self._on(parts["clips"].upload, do.add_videos, [parts["clips"], parts["frames"], *controls], **LINE)
        self._on(parts["unit"].input, do.limits, self._parts("unit", "budget"))
        changes = [parts[name].change for name in ("method", "budget", "positions", "size_bias")]
        self._on(changes, do.redraw, controls, trigger_mode="always_last", **LINE)
        self._on(parts["picture"].select, do.choose, controls, event=True, **LINE)
        self._on(parts["picture"].input, do.pick, [], event=True, trigger_mode="multiple", **AT_ONCE)
        self._in_browser(parts["picture"].input, _PICKING, ["status", "conversation"], ["status"])
        self._in_browser(parts["stop"].click, _STOPPING, ["status"], ["status"])
        self._on(parts["stop"].click, do.stop, [parts["number"]], **AT_ONCE)
        self._connect_questions(controls)
        written = ["number", "question", "conversation", "status", "strip"]
        left = self._in_browser(parts["new"].click, _LEAVING, ["number"], written)
        self._then(left, do.leave, [parts["number"]], **AT_ONCE)
        self._then(left, do.forget, [], **LINE)
        for button, example in zip(parts["examples"], EXAMPLES, strict=True):
            self._connect_example(button, example, controls)

    def _connect_questions(self, controls: list[Any]) -> None:
        parts, do = self.parts, self.handlers
        counted = self._parts("number", "picked")
        for triggers, handler, inputs in (
            ([parts["ask"].click, parts["question"].submit], do.ask, [parts["question"], *controls, *counted]),
            ([parts["again"].click], do.ask_again, [*controls, *counted]),
            ([parts["compare"].click, parts["compared"].submit], do.compare, [parts["compared"], *controls, *counted]),
        ):
            asked = self._in_browser(triggers, _ASKING, ["number"], ["number", "picked", "status"])
            done = self._then(asked, handler, inputs, grows=True, **LINE)
            if handler == do.ask:
                self._clear(done)

    def _connect_example(self, button: Any, example: Example, controls: list[Any]) -> None:
        def begin_with(talk: Talk, *values: Any) -> Change:
            return self.handlers.example(talk, example, *values)

        parts, counted = self.parts, self._parts("number", "picked")
        line = words.status("waiting for the model …", busy=True, waiting=True)
        asking = f"(number) => [number + 1, 0, {json.dumps(example.question)}, `{line}`]"
        clicked = self._in_browser(button.click, asking, ["number"], ["number", "picked", "question", "status"])
        self._then(clicked, self.handlers.leave, [parts["number"]], api_name=False, **AT_ONCE)
        shown = self._then(clicked, begin_with, controls, api_name=False, **LINE)
        inputs = [parts["question"], *controls, *counted]
        self._clear(self._then(shown, self.handlers.ask, inputs, grows=True, api_name=False, **LINE))

    def _parts(self, *names: str) -> list[Any]:
        return [self.parts[name] for name in names]

    def _clear(self, asked: Any) -> None:
        inputs = self._parts("question", "status", "conversation")
        asked.then(fn=None, js=_CLEAR, inputs=inputs, outputs=inputs[0], api_name=False)

    def _in_browser(self, triggers: Any, js: str, inputs: list[str], outputs: list[str]) -> Any:
        own = {"inputs": self._parts(*inputs), "outputs": self._parts(*outputs), "trigger_mode": "multiple"}
        return gr.on(triggers if isinstance(triggers, list) else [triggers], fn=None, js=js, api_name=False, **own)

    def _on(
        self, triggers: Any, handler: Callable[..., Any], inputs: list[Any], event: bool = False, **more: Any
    ) -> Any:
        own = self._event(handler, inputs, False, event) | more
        return gr.on(triggers if isinstance(triggers, list) else [triggers], **own)

    def _then(
        self, before: Any, handler: Callable[..., Any], inputs: list[Any], grows: bool = False, **more: Any
    ) -> Any:
        return before.then(**self._event(handler, inputs, grows) | more)

    def _event(
        self, handler: Callable[..., Any], inputs: list[Any], grows: bool, event: bool = False
    ) -> dict[str, Any]:
        """Arguments of an event: the handler gets the visitor's conversation, and says what changes by name."""
        changes = _CHANGES[handler.__name__]

        def row(talk: Talk, change: Change) -> Any:
            if not change and changes:
                return [gr.skip()] * len(changes)
            talk.shown |= change
            values = [talk.shown.get(part, "") for part in changes]
            return values if len(values) > 1 else values[0] if values else None

        def failed(talk: Talk, error: Exception) -> Any:
            stopped = isinstance(error, StoppedError)
            line = words.status(_STOPPED) if stopped else words.status(in_one_line(error), error=True)
            if stopped and talk.leaving:  # the browser has cleared the page already
                return row(talk, {"status": "", "conversation": words.conversation([])})
            return row(
                talk, {"status": line, "conversation": words.conversation(talk.exchanges), "uploads": "", "clips": ""}
            )

        def once(request: gr.Request, *values: Any) -> Any:
            talk = Talk()  # of one that has ended
            try:
                talk = self.visitors.talk(request.session_hash)
                return row(talk, handler(talk, *values))
            except Exception as error:
                return failed(talk, error)

        def with_event(request: gr.Request, data: gr.EventData, *values: Any) -> Any:
            return once(request, data, *values)

        def growing(request: gr.Request, *values: Any) -> Iterator[Any]:
            talk = Talk()
            try:
                talk = self.visitors.talk(request.session_hash)
                for change in handler(talk, *values):
                    yield row(talk, change)
            except Exception as error:
                yield failed(talk, error)

        return {
            "fn": growing if grows else with_event if event else once,
            "inputs": inputs,
            "outputs": self._parts(*changes),
            "show_progress": "minimal" if "status" in changes else "hidden",
            "show_progress_on": self._parts("status") if "status" in changes else None,
            "api_name": handler.__name__,
        }

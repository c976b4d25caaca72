"""The page's components and what connects them to the handlers. Nothing of it is loaded from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import gradio as gr
import torch
from starlette.middleware import Middleware

from llava.demo import show
from llava.demo.desk import Desk
from llava.demo.examples import EXAMPLES, Example
from llava.demo.guard import Guard
from llava.demo.handlers import OWN, POSITIONS, SHARE, SIZE_BIAS, TOKENS, Change, Handlers
from llava.demo.talk import StoppedError, Talk
from llava.demo.uploads import MAX_BYTES
from llava.demo.visitors import Visitors
from llava.serve.cli import describe
from visionzip.methods import METHODS

# Served from here; of the theme's own weights the semi-bold one has letters missing.
FONT = gr.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700))
QUEUE = 32  # requests that wait; further ones are refused
# What each handler changes. The rest is left out, not sent as an update of nothing: gradio keeps a component for each
# of these in a visitor's session.
_CHANGES = {
    "add_images": ("uploads", "picture", "status"),
    "limits": ("budget",),
    "redraw": ("picture", "status"),
    "choose": ("picture", "status"),
    "pick": ("status",),
    "begin": ("status",),
    "stop": (),
    "forget": ("picture", "conversation", "status", "question", "strip"),
    "begin_with": ("picture", "conversation", "status", "question"),
    "ask": ("conversation", "status"),
    "ask_again": ("conversation", "status"),
    "compare": ("strip", "status"),
}
_CLEAR = "(question, status) => [status.includes('answered') ? '' : question]"  # in the browser, where an answer came
# In the browser, before the server hears of it: an answer to the click could come after the line of what was stopped,
# and would stay.
_STOPPING = f"(status) => [status.includes('vz-busy') ? `{show.status('stopping …', busy=True)}` : status]"
_STOPPED = "stopped: the conversation is as it was before this question"

logger = logging.getLogger(__name__)


def asset(name: str) -> str:
    """Text of one of the page's files."""
    return (files("llava.demo") / "assets" / name).read_text(encoding="utf-8")


def in_one_line(error: Exception) -> str:
    """An error as a visitor reads it; what nobody foresaw goes to the log too."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory: take a smaller budget, or fewer or smaller images"
    if isinstance(error, ValueError | TypeError | OSError):
        return str(error)
    logger.error("the page failed", exc_info=error)
    return f"{type(error).__name__}: {error}"


class Page:
    """The page of one model.

    Args:
        desk: the model.
        about: one line on it.
    """

    def __init__(self, desk: Desk, about: str) -> None:
        self.handlers = Handlers(desk)
        self.visitors = Visitors(desk)
        self.parts: dict[str, Any] = {}
        with gr.Blocks(title="VisionZip", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML(f"<h1>VisionZip</h1><p>{about}</p>", elem_id="vz-title")
            self._lay_out(desk)
            self._connect()
        self.blocks.queue(max_size=QUEUE, default_concurrency_limit=1)

    @classmethod
    def of(cls, tokenizer: Any, model: Any, image_processor: Any, conv_mode: str, name: str, **settings: Any) -> Page:
        """The page of a model that has answered once, so that the first visitor need not wait for its kernels."""
        desk = Desk(tokenizer, model, image_processor, conv_mode, **settings)
        about = f"{name}: {describe(model).rpartition(' · ')[0]}"  # without the setting, which the page changes
        desk.warm_up()
        return cls(desk, about)

    def launch(self, host: str, port: int | None, **more: Any) -> str:
        """Serve the page; its address.

        Args:
            host: address of the interface that is listened on.
            port: of the server; None takes a free one.
            **more: for gradio's ``launch``.

        Raises:
            OSError: the port is taken.
        """
        settings = {
            "server_name": host,
            "server_port": port,
            "share": False,
            "ssr_mode": False,
            "mcp_server": False,
            "enable_monitoring": False,
            "run_history": False,
            "footer_links": [],
            "max_file_size": 0,  # gradio's own uploads are off: see Guard
            "state_session_capacity": 256,
            "theme": gr.themes.Default(font=[FONT, "sans-serif"], font_mono=["monospace"], primary_hue="blue"),
            "css": asset("page.css"),
            "quiet": True,
            "app_kwargs": {"middleware": [Middleware(Guard)]},
        }
        return self.blocks.launch(**settings | more)[1]

    def _lay_out(self, desk: Desk) -> None:
        parts = self.parts
        with gr.Row(elem_id="vz-main"):
            with gr.Column(scale=5, min_width=320):
                parts["uploads"] = gr.HTML(
                    "",
                    html_template=asset("uploads.html"),
                    js_on_load=asset("uploads.js"),
                    apply_default_css=False,
                    limit=MAX_BYTES,
                )
                parts["picture"] = gr.HTML(
                    "", html_template=asset("picture.html"), js_on_load=asset("picture.js"), apply_default_css=False
                )
            with gr.Column(scale=7, min_width=320):
                with gr.Row(elem_id="vz-examples"):
                    gr.HTML("<h2>The paper's figures</h2>", apply_default_css=False, min_width=120, scale=0)
                    parts["examples"] = [gr.Button(example.label, size="sm", min_width=90) for example in EXAMPLES]
                self._lay_out_controls(desk)
                parts["status"] = _html("", html_template=asset("status.html"), elem_id="vz-line")
                with gr.Tabs():
                    with gr.Tab("Talk"):
                        self._lay_out_talk()
                    with gr.Tab("Compare methods"):
                        parts["compared"] = gr.Textbox(
                            label="Question", placeholder="the last one, if you leave this empty"
                        )
                        parts["compare"] = gr.Button("Compare all methods at this budget", variant="primary")
                        parts["strip"] = _html("")

    def _lay_out_controls(self, desk: Desk) -> None:
        parts, own = self.parts, desk.default
        with gr.Row(elem_id="vz-controls"):
            parts["method"] = gr.Dropdown(list(METHODS), value=own.method, label="Method", scale=3, min_width=120)
            parts["budget"] = gr.Slider(
                1, desk.patches, value=own.tokens(desk.patches), step=1, label="Tokens of each image or tile", scale=4
            )
            parts["unit"] = gr.Radio([TOKENS, SHARE], value=TOKENS, label="Budget in", scale=4, min_width=220)
        with gr.Accordion("More of the method", open=False), gr.Row():
            parts["positions"] = gr.Dropdown(
                list(POSITIONS), value=own.positions or OWN, label="Positions of kept tokens"
            )
            bias = next(name for name, value in SIZE_BIAS.items() if value == own.size_bias)
            parts["size_bias"] = gr.Dropdown(list(SIZE_BIAS), value=bias, label="Size bias in attention")

    def _lay_out_talk(self) -> None:
        parts = self.parts
        with gr.Row(elem_id="vz-ask"):
            parts["question"] = gr.Textbox(
                label="Question", placeholder="Ask about the image", scale=3, lines=1, max_lines=4
            )
            parts["ask"] = gr.Button("Ask", variant="primary", min_width=70, scale=0)
            parts["again"] = gr.Button("Ask again", min_width=112, scale=0)
            parts["stop"] = gr.Button("Stop", min_width=70, scale=0)
            parts["new"] = gr.Button("New", min_width=70, scale=0)
        parts["conversation"] = _html(show.conversation([]), elem_id="vz-talk")

    def _connect(self) -> None:
        parts, do = self.parts, self.handlers
        controls = [parts[name] for name in ("method", "unit", "budget", "positions", "size_bias")]
        model = {"concurrency_id": "model", "concurrency_limit": 1}
        self._on(parts["uploads"].upload, do.add_images, [parts["uploads"], *controls], **model)
        self._on(parts["unit"].input, do.limits, [parts["unit"], parts["budget"]])
        changes = [parts[name].change for name in ("method", "budget", "positions", "size_bias")]
        self._on(changes, do.redraw, controls, trigger_mode="always_last", **model)
        self._on(parts["picture"].select, do.choose, controls, event=True, **model)
        self._on(parts["picture"].input, do.pick, [], event=True, trigger_mode="multiple", queue=False)
        gr.on(
            [parts["stop"].click],
            fn=None,
            js=_STOPPING,
            inputs=[parts["status"]],
            outputs=[parts["status"]],
            api_name=False,
        )
        self._on(parts["stop"].click, do.stop, [], queue=False)
        self._on(parts["new"].click, do.forget, [], queue=False)
        asks = ([parts["ask"].click, parts["question"].submit], do.ask, [parts["question"], *controls])
        for triggers, handler, inputs in (
            asks,
            ([parts["again"].click], do.ask_again, controls),
            ([parts["compare"].click, parts["compared"].submit], do.compare, [parts["compared"], *controls]),
        ):
            begun = self._on(triggers, do.begin, [], queue=False, api_name=False)
            done = begun.then(**self._event(handler, inputs, True), **model)
            if handler == do.ask:
                self._clear(done)
        for button, example in zip(parts["examples"], EXAMPLES, strict=True):
            self._connect_example(button, example, controls, model)
        self.blocks.unload(self._leave)

    def _connect_example(self, button: Any, example: Example, controls: list[Any], model: dict[str, Any]) -> None:
        def begin_with(talk: Talk, *values: Any) -> Change:
            return self.handlers.example(talk, example, *values)

        shown = self._on(button.click, begin_with, controls, api_name=False, **model)
        event = self._event(self.handlers.ask, [self.parts["question"], *controls], True)
        self._clear(shown.then(**event | {"api_name": False}, **model))

    def _clear(self, asked: Any) -> None:
        question, status = self.parts["question"], self.parts["status"]
        asked.then(fn=None, js=_CLEAR, inputs=[question, status], outputs=[question], api_name=False)

    def _on(
        self, triggers: Any, handler: Callable[..., Any], inputs: list[Any], event: bool = False, **more: Any
    ) -> Any:
        own = self._event(handler, inputs, False, event) | more
        return gr.on(triggers if isinstance(triggers, list) else [triggers], **own)

    def _event(
        self, handler: Callable[..., Any], inputs: list[Any], grows: bool, event: bool = False
    ) -> dict[str, Any]:
        """Arguments of an event: the handler gets the visitor's conversation, and says what changes by name."""
        changes = _CHANGES[handler.__name__]

        def row(talk: Talk, change: Change) -> Any:
            talk.shown |= change
            values = [talk.shown.get(part, "") for part in changes]
            return values if len(values) > 1 else values[0] if values else None

        def failed(talk: Talk, error: Exception) -> Any:
            stopped = isinstance(error, StoppedError)
            line = show.status(_STOPPED) if stopped else show.status(in_one_line(error), error=True)
            return row(talk, {"status": line, "conversation": show.conversation(talk.exchanges), "uploads": ""})

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
            "outputs": [self.parts[part] for part in changes],
            "show_progress": "hidden",
            "api_name": handler.__name__,
        }

    def _leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)


def _html(value: str, **more: Any) -> Any:
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **more)

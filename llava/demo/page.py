"""The page's components, and its server. Nothing of it is loaded from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from llava.demo.conversation.desk import Desk
from llava.demo.conversation.visitors import Visitors
from llava.demo.drawing import words
from llava.demo.events import Events
from llava.demo.examples import EXAMPLES
from llava.demo.guard import Guard
from llava.demo.handlers import LABELS, OWN, POSITIONS, SIZE_BIAS, Handlers
from llava.demo.models.page_model import PageModel
from llava.demo.uploads import videos
from llava.demo.uploads.images import MAX_BYTES
from llava.serve.cli import describe
from llava.video import FRAMES
from visionzip.methods import METHODS

# Served from here; of the theme's own weights the semi-bold one has letters missing.
FONT = gr.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700))
QUEUE = 32  # requests that wait; further ones are refused


def asset(name: str) -> str:
    """Text of one of the page's files."""
    return (files("llava.demo") / "assets" / name).read_text(encoding="utf-8")


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
            Events(self.parts, self.handlers, self.visitors).connect()
            self.blocks.unload(self._leave)
        self.blocks.queue(max_size=QUEUE, default_concurrency_limit=1)

    @classmethod
    def of(cls, page_model: PageModel, name: str, **settings: Any) -> Page:
        """The page of a model that has answered once, so that the first visitor need not wait for its kernels."""
        desk = Desk(page_model, **settings)
        about = f"{name}: {describe(page_model.model).rpartition(' · ')[0]}"  # without the setting, which changes
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
        for name in ("number", "picked"):  # of the last question and pick: the browser counts them
            parts[name] = gr.Number(0, visible=False)
        with gr.Row(elem_id="vz-main"):
            with gr.Column(scale=5, min_width=320):
                with gr.Row(elem_id="vz-uploads"):
                    self._lay_out_uploads(desk)
                parts["picture"] = gr.HTML(
                    "", html_template=asset("picture.html"), js_on_load=asset("picture.js"), apply_default_css=False
                )
            with gr.Column(scale=7, min_width=320):
                with gr.Row(elem_id="vz-examples"):
                    _html("<h2>Paper's figures</h2>")
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

    def _lay_out_uploads(self, desk: Desk) -> None:
        images = {"title": "Add images", "limits": "PNG, JPEG, WebP …, up to 10 MB each", "accept": "image/*"}
        self.parts["uploads"] = _drop("images", MAX_BYTES, **images)
        if desk.page_model.takes_videos:
            limits = f"MP4, WebM, GIF, up to {videos.MAX_SECONDS} s and {videos.MAX_BYTES >> 20} MB"
            accept = "video/mp4,video/webm,video/quicktime,image/gif"
            self.parts["clips"] = _drop("videos", videos.MAX_BYTES, title="Add a video", limits=limits, accept=accept)
            # Its limits are the handler's, whose error is a line of the page.
            self.parts["frames"] = gr.Number(FRAMES, label="Frames", min_width=84, scale=0, elem_id="vz-number")

    def _lay_out_controls(self, desk: Desk) -> None:
        parts, own = self.parts, desk.default
        unit, top, value = self.handlers.budget()
        with gr.Row(elem_id="vz-controls"):
            parts["method"] = gr.Dropdown(list(METHODS), value=own.method, label="Method", scale=3, min_width=120)
            parts["budget"] = gr.Slider(1, top, value=value, step=1, label=LABELS[unit], scale=4)
            units = list(self.handlers.units)
            parts["unit"] = gr.Radio(units, value=unit, label="Budget in", scale=4, min_width=220)
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
        parts["conversation"] = _html(words.conversation([]), elem_id="vz-talk")

    def _leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)


def _drop(kind: str, limit: int, **words: str) -> Any:
    template, code = asset("uploads.html"), asset("uploads.js")
    return gr.HTML(
        "",
        html_template=template,
        js_on_load=code,
        apply_default_css=False,
        kind=kind,
        limit=limit,
        min_width=150,
        **words,
    )


def _html(value: str, **more: Any) -> Any:
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **more)

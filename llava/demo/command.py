"""``visionzip demo``: load a model and serve the page on this machine."""

from __future__ import annotations

import argparse
import os
from html import escape
from pathlib import Path

from llava.arguments import add_generation_arguments, add_model_arguments, load_from_arguments, sampling
from llava.commands import positive


def demo(args: argparse.Namespace) -> None:
    """Serve a page that shows what is kept of an image, answers with and without VisionZip, and compares methods.

    On this machine alone, and without the network: nothing is sent elsewhere. Ctrl-C ends it.

    Raises:
        ValueError: the model cannot be loaded as asked.
        OSError: the port is taken.
        ImportError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    import gradio  # noqa: F401, PLC0415 - an extra: said before a model is loaded

    from llava.demo.page import Page  # noqa: PLC0415 - needs gradio
    from llava.demo.desk import Desk  # noqa: PLC0415
    from llava.serve.cli import describe  # noqa: PLC0415

    settings = sampling(args.temperature, max_new_tokens=args.max_new_tokens)
    desk = Desk(*load_from_arguments(args), **settings)
    desk.warm_up()
    name = Path(args.model_path).name
    page = Page(desk, escape(f"{name}: {describe(desk.model)}"))
    page.launch(args.port)


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip demo``."""
    add_model_arguments(parser, unzipped="the checkpoint's own, else 2 in 9 of the patches")
    parser.add_argument("--port", type=positive, default=7860, help="of the server, on 127.0.0.1")
    add_generation_arguments(parser)
    parser.set_defaults(run=demo)

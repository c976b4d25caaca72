"""``visionzip demo``: load a model and serve the page on this machine."""

from __future__ import annotations

import argparse
import os
import socket
from html import escape
from pathlib import Path

from llava.commands.arguments import add_generation_arguments, add_model_arguments, sampling
from llava.commands.loading import has_processor, load_from_arguments, load_with_processor
from llava.commands.parsers import positive
from llava.demo.models.llava_model import LlavaModel
from llava.demo.models.page_model import PageModel
from llava.demo.models.processor_model import ProcessorModel

HOST = "127.0.0.1"


def demo(args: argparse.Namespace) -> None:
    """Serve a page that shows what is kept of an image, answers with and without VisionZip, and compares methods.

    On this machine alone, and without the network: nothing is sent elsewhere. Ctrl-C ends it.

    Raises:
        ValueError: the model cannot be loaded as asked.
        OSError: the port is taken.
        ImportError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    from llava.demo.page import Page  # noqa: PLC0415 - needs gradio, an extra: said before a model is loaded

    check_port(args.port)
    settings = sampling(args.temperature, max_new_tokens=args.max_new_tokens)
    page_model: PageModel
    if has_processor(args.model_path):
        page_model = ProcessorModel(*load_with_processor(args))
    else:
        page_model = LlavaModel(*load_from_arguments(args))
    page = Page.of(page_model, name=escape(Path(args.model_path).name), **settings)
    page.launch(HOST, args.port, prevent_thread_lock=True)
    print(f"the page: http://{HOST}:{args.port} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()


def check_port(port: int) -> None:
    """Check that a port can be served on, before a model is loaded.

    Raises:
        ValueError: it is no number of a port.
        OSError: it is taken.
    """
    if port > 65535:
        raise ValueError(f"--port {port} is above 65535: choose another one")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise OSError(f"--port {port} cannot be served on ({error.strerror}): choose another one") from error


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip demo``."""
    add_model_arguments(
        parser,
        "the checkpoint's own, else 2 in 9 of the patches; half of today's families' tokens",
        "checkpoints/llava-mini",
    )
    parser.add_argument("--port", type=positive, default=7860, help=f"of the server, on {HOST}")
    add_generation_arguments(parser)
    # Answers are compared: drawn at random they would differ by themselves.
    parser.set_defaults(run=demo, temperature=0.0)

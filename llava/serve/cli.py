"""Chat about images and videos in the terminal: ``visionzip chat`` and, with LLaVA's flags, ``llava.serve.cli``."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from llava.arguments import add_model_arguments, load_from_arguments, positive, run_command, sampling
from llava.images import load_image
from llava.model.transformers_llava import generating_module
from llava.serve.chat import ChatSession
from llava.video import FRAMES, load_video

_HELP = "/image FILE and /video FILE ask about another one too, /reset starts anew, /exit (or an empty line) ends."


def chat(args: argparse.Namespace) -> None:
    """Answer questions about images and videos, from standard input until it ends, keeping the KV cache."""
    generate_kwargs = sampling(args.temperature, max_new_tokens=args.max_new_tokens)
    openers = {"/image": load_image, "/video": partial(load_video, frames=args.frames)}
    first = [load_image(file) for file in args.image_file or []]
    first += [load_video(file, args.frames) for file in args.video or []]
    tokenizer, model, image_processor, conv_mode = load_from_arguments(args, getattr(args, "vanilla", None))
    session = ChatSession(model, tokenizer, image_processor, conv_mode, **generate_kwargs)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"{describe(model)} · template {conv_mode} · {_HELP}", style="dim")
    pending = first
    user, assistant = session.conversation.roles
    while line := _read_line(f"{user or 'USER'}: "):
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        try:
            if command == "/reset":
                session.reset()
                pending = first
                continue
            if command in openers:
                place = os.path.expanduser(rest.strip())  # noqa: PTH111 - a Path would make https:/ of an address
                pending = [*pending, openers[command](place)]
                continue
            print(f"{assistant or 'ASSISTANT'}: ", end="", flush=True)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            turn = session.ask(line, pending, streamer)
        except (ValueError, OSError) as error:  # a wrong file or an overlong conversation does not end the chat
            console.print(str(error), style="red")
            continue
        pending = []
        console.print(str(turn), style="dim")
        if args.debug:
            console.print(repr(session.conversation.get_prompt()))


def describe(model: Any) -> str:
    """One line on the model: class, device and type, VisionZip's setting."""
    setting = model.get_vision_tower().visionzip
    zipped = f"VisionZip {setting.dominant} + {setting.contextual}" if setting else "not zipped"
    precision = str(model.dtype).removeprefix("torch.")
    return f"{type(generating_module(model)).__name__} on {model.device}, {precision} · {zipped}"


def _read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """LLaVA's flags of its terminal chat, and VisionZip's two."""
    add_model_arguments(parser)
    parser.add_argument(
        "--image-file",
        "--image",
        nargs="+",
        action="extend",
        metavar="IMAGE",
        help="images that the first question is about",
    )
    parser.add_argument("--video", nargs="+", action="extend", help="videos that the first question is about")
    parser.add_argument("--frames", type=positive, help=f"frames of each video ({FRAMES}, repeated in shorter ones)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 for greedy decoding (default: 0.2)")
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="longest answer (default: 512)")
    parser.add_argument("--debug", action="store_true", help="print the whole prompt after each turn")


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m llava.serve.cli``."""
    parser = argparse.ArgumentParser("python -m llava.serve.cli", description=__doc__, epilog=_HELP)
    add_chat_arguments(parser)
    return run_command(parser.prog, chat, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

"""Chat about images and videos in the terminal: ``visionzip chat`` and, with LLaVA's flags, ``llava.serve.cli``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import suppress
from functools import partial
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from transformers import TextStreamer

from llava.commands import screen
from llava.commands.arguments import (
    add_frames_argument,
    add_generation_arguments,
    add_image_argument,
    add_language_arguments,
    add_method_arguments,
    add_model_arguments,
    sampling,
)
from llava.commands.loading import has_processor, load_from_arguments, load_with_processor
from llava.commands.parsers import hint, parser_of, run_command
from llava.images import load_image
from llava.model.stock.transformers_llava import generating_module
from llava.serve.chat import ChatSession
from llava.serve.processor_chat import ProcessorSession
from llava.video import load_video
from visionzip import visionzip

_COMMANDS = {
    "/image": "FILE: the next question is about this image too",
    "/video": "FILE: the next question is about this video too",
    "/reset": "forget all that was said, and begin with the first images again",
    "/help": "this list",
    "/exit": "end, as an empty line and Ctrl-D do; Ctrl-C cancels a line or an answer only",
}


def chat(args: argparse.Namespace) -> None:
    """Answer questions about images and videos, from standard input until it ends, keeping the KV cache.

    In the chat /help lists the commands; Ctrl-C cancels the line or the answer.
    """
    generate_kwargs = sampling(args.temperature, max_new_tokens=args.max_new_tokens)
    openers = {"/image": load_image, "/video": partial(load_video, frames=args.frames)}
    first = [load_image(file) for file in args.image or []]
    first += [load_video(file, args.frames) for file in args.video or []]
    session, template = _open_session(args, generate_kwargs)
    console = screen.console()
    screen.say(f"{describe(session.model)} · template {template} · /help lists the commands", "dim", console)
    pending = first
    user, assistant = session.roles
    streamer = _Wrapped(session.tokenizer, console)
    while line := _read_line(f"{user}: "):
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        try:
            if command == "/reset":
                session.reset()
                pending = first
            elif command in openers:
                if not rest.strip():
                    raise ValueError(f"{command} needs a file: {command} FILE")
                place = os.path.expanduser(rest.strip())  # noqa: PTH111 - a Path would make https:/ of an address
                pending = [*pending, openers[command](place)]
            elif command == "/help":
                for name, meaning in _COMMANDS.items():
                    screen.say(f"{name} {meaning}", "dim", console)
            elif re.fullmatch(r"/\w*", command):  # a path or a fraction is no command
                raise ValueError(f"unknown command {command!r}{hint(command, _COMMANDS)}")
            else:
                streamer.begin(f"{assistant}: ")
                turn = session.ask(line, pending, streamer)
                pending = []
                screen.say(str(turn), "dim", console)
                if args.debug:
                    screen.say(repr(session.prompt), "", console)
        except KeyboardInterrupt:
            screen.say("\ncancelled: the conversation is as it was before this line", "dim", console)
        except (ValueError, OSError) as error:  # a wrong file or an overlong conversation does not end the chat
            screen.say(str(error), "red", console)


def _open_session(args: argparse.Namespace, generate_kwargs: dict[str, Any]) -> tuple[Any, str]:
    """Load the model, and begin a conversation in its template."""
    vanilla = getattr(args, "vanilla", None)
    if has_processor(args.model_path):
        if args.video:
            raise ValueError(f"--video is for LLaVA's families: the processor of {args.model_path} gets images")
        model, processor = load_with_processor(args, vanilla)
        if not hasattr(model, "_visionzip"):
            with suppress(TypeError):  # of no family that can be zipped
                visionzip(model, keep=1.0)  # the stock model's answers, with a cache that later turns can use
        return ProcessorSession(model, processor, **generate_kwargs), "of the checkpoint"
    tokenizer, model, image_processor, conv_mode = load_from_arguments(args, vanilla)
    return ChatSession(model, tokenizer, image_processor, conv_mode, **generate_kwargs), conv_mode


def describe(model: Any) -> str:
    """One line on the model: class, device and type, VisionZip's setting."""
    on = getattr(model, "_visionzip", None)
    setting = model.get_vision_tower().visionzip if hasattr(model, "get_vision_tower") else on and on.config
    zipped = "not zipped"
    if setting is None or setting.keep == 1.0:
        pass
    elif setting.keep is None:
        zipped = f"VisionZip {setting.dominant} + {setting.contextual}"
    else:
        zipped = f"{setting.method}, {setting}"
    precision = str(model.dtype).removeprefix("torch.")
    return f"{type(generating_module(model)).__name__} on {model.device}, {precision} · {zipped}"


def _read_line(prompt: str) -> str:
    """The next line without spaces around it, empty at the end; Ctrl-C begins it anew."""
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            print()
            return ""
        except KeyboardInterrupt:
            print()


class _Wrapped(TextStreamer):
    """Prints an answer as it comes, broken between words where the terminal ends."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._console = console
        self._width: int | None = None
        self._column = 0
        self._space = ""  # not printed yet: a line does not end with it

    def begin(self, name: str) -> None:
        """Say who answers, and forget an answer that was cancelled."""
        self.token_cache, self.print_len, self.next_tokens_are_prompt = [], 0, True
        self._width = self._console.width if self._console.is_terminal else None  # which may have changed
        self._column, self._space = cell_len(name), ""
        print(name, end="", flush=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print some whole words."""
        for word in re.findall(r"\n|[^\S\n]+|\S+", text):
            if word == "\n":
                self._column, self._space = 0, ""
                print()
            elif word.isspace():
                self._space += word
            else:
                needed = cell_len(self._space + word)
                if self._width and self._column and self._column + needed > self._width:
                    self._column, self._space, needed = 0, "", cell_len(word)
                    print()
                print(self._space + word, end="")
                self._column, self._space = self._column + needed, ""
        print(end="\n" if stream_end else "", flush=True)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """LLaVA's flags of its terminal chat, and VisionZip's two."""
    _add_arguments(parser, "the model is left as the checkpoint has it")


def add_zipped_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip chat``."""
    _add_arguments(parser, "the checkpoint's own, else 54 + 10; half of today's families' tokens")
    add_method_arguments(parser)
    parser.add_argument("--vanilla", action="store_true", help="keep all visual tokens")


def _add_arguments(parser: argparse.ArgumentParser, unzipped: str) -> None:
    add_model_arguments(parser, unzipped)
    add_language_arguments(parser)
    add_image_argument(parser, "images that the first question is about")
    parser.add_argument(
        "--video", nargs="+", action="extend", metavar="VIDEO", help="videos that the first question is about"
    )
    add_frames_argument(parser)
    add_generation_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="print the whole prompt after each turn")
    parser.set_defaults(run=chat)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m llava.serve.cli``."""
    parser = parser_of("python -m llava.serve.cli", add_chat_arguments)
    return run_command(parser.prog, chat, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

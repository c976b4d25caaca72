"""Chat with an image in the terminal: ``python -m llava.serve.cli``, with LLaVA's flags, and ``visionzip chat``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TextStreamer

from llava.conversation import conv_mode_for, conv_templates
from llava.mm_utils import get_model_name_from_path, load_image
from llava.model.builder import load_pretrained_model
from llava.serve.chat import ChatSession
from visionzip import VisionZipConfig, unzip, visionzip

_HELP = "/image FILE asks about another image too, /reset starts anew, /exit (or an empty line) ends."


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model to load and how, shared by all commands."""
    parser.add_argument("--model-path", required=True, help="checkpoint: folder or hub name")
    parser.add_argument("--model-base", help="for a projector or LoRA checkpoint: the model it completes")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="prompt template (default: by model name)")
    parser.add_argument("--device", help="cuda, cpu, … (default: cuda if there is any)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise the language model to 8 bits")
    parser.add_argument("--load-4bit", action="store_true", help="quantise the language model to 4 bits")
    parser.add_argument("--dominant", type=int, help="VisionZip: tokens to keep per image or tile, CLS included")
    parser.add_argument("--contextual", type=int, help="VisionZip: tokens to merge the rest into")


def load_from_arguments(args: Any) -> tuple[Any, Any, Any, str]:
    """Load the model that :func:`add_model_arguments` describes, zipped as it says.

    Without a budget, LLaVA's commands leave the model as its checkpoint has it, while those of ``visionzip`` (which
    have ``--vanilla`` to say no) apply the checkpoint's own setting or the default one.

    Returns:
        tokenizer, model, image_processor, conv_mode.

    Raises:
        ValueError: the budget is not valid; before anything is loaded.
    """
    given = {name: getattr(args, name, None) for name in ("dominant", "contextual")}
    given = {name: value for name, value in given.items() if value is not None}
    VisionZipConfig(**given)
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        load_8bit=getattr(args, "load_8bit", False),
        load_4bit=getattr(args, "load_4bit", False),
        device=getattr(args, "device", None),
    )
    if getattr(args, "vanilla", False):
        unzip(model)
    elif given or hasattr(args, "vanilla"):
        visionzip(model, **given)
    return tokenizer, model, image_processor, args.conv_mode or conv_mode_for(name)


def sampling(temperature: float, **kwargs: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for a temperature; 0 is greedy."""
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0: use 0 for greedy decoding")
    return {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {}), **kwargs}


def chat(args: argparse.Namespace) -> None:
    """Answer questions from standard input until it ends."""
    generate_kwargs = sampling(args.temperature, max_new_tokens=args.max_new_tokens)
    first = [load_image(file) for file in args.image_file or []]
    tokenizer, model, image_processor, conv_mode = load_from_arguments(args)
    session = ChatSession(model, tokenizer, image_processor, conv_mode, **generate_kwargs)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[dim]{describe(model)} · template {conv_mode} · {_HELP}[/dim]")
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
            if command == "/image":
                pending = [*pending, load_image(Path(rest.strip()).expanduser())]
                continue
            print(f"{assistant or 'ASSISTANT'}: ", end="", flush=True)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            turn = session.ask(line, pending, streamer)
        except (ValueError, OSError) as error:  # a wrong file or an overlong conversation does not end the chat
            console.print(f"[red]{error}[/red]")
            continue
        pending = []
        console.print(f"[dim]{turn}[/dim]")
        if args.debug:
            console.print({"prompt": session.conversation.get_prompt(), "turn": turn})


def describe(model: Any) -> str:
    """One line on the model: class, device and type, VisionZip's setting."""
    setting = model.get_vision_tower().visionzip
    zipped = f"VisionZip {setting.dominant} + {setting.contextual}" if setting else "not zipped"
    precision = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__} on {model.device}, {precision} · {zipped}"


def _read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """LLaVA's flags of its terminal chat, and VisionZip's two."""
    add_model_arguments(parser)
    parser.add_argument(
        "--image-file", "--image", nargs="+", metavar="IMAGE", help="images that the first question is about"
    )
    parser.add_argument("--temperature", type=float, default=0.2, help="0 for greedy decoding (default: 0.2)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--debug", action="store_true", help="print the whole prompt after each turn")


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m llava.serve.cli``."""
    parser = argparse.ArgumentParser("python -m llava.serve.cli", description=__doc__, epilog=_HELP)
    add_chat_arguments(parser)
    torch.manual_seed(0)
    chat(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the commands share: which model to load and how, and errors that a user can act on."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from huggingface_hub.constants import HF_HOME

from llava.conversation import conv_mode_for, conv_templates, new_conversation
from llava.files import WriteError, full_disk
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from visionzip import VisionZipConfig, unzip, visionzip


def add_model_arguments(parser: argparse.ArgumentParser, budget: bool = True) -> None:
    """Flags that say which model to load and how, for :func:`load_from_arguments`; ``budget``: also how to zip it."""
    parser.add_argument("--model-path", required=True, help="checkpoint: folder or hub name")
    parser.add_argument("--model-base", help="for a projector or LoRA checkpoint: the model it completes")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="prompt template (default: by model name)")
    parser.add_argument("--device", help="cuda, cpu, … (default: cuda if there is any)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise the language model to 8 bits")
    parser.add_argument("--load-4bit", action="store_true", help="quantise the language model to 4 bits")
    if budget:
        parser.add_argument("--dominant", type=int, help="VisionZip: tokens to keep per image or tile, CLS included")
        parser.add_argument("--contextual", type=int, help="VisionZip: tokens to merge the rest into")


def positive(text: str) -> int:
    """A flag's whole number of at least 1; argparse reports the error."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def load_from_arguments(args: Any, vanilla: bool | None = None) -> tuple[Any, Any, Any, str]:
    """Load the model that :func:`add_model_arguments` describes, zipped as it says.

    Args:
        args: the parsed flags, or any object with ``model_path``, ``model_base`` and ``conv_mode``; the rest may lack.
        vanilla: without a budget in ``args``: None leaves the model as its checkpoint has it (LLaVA's commands), True
            unzips it, False applies the checkpoint's own setting or the default one.

    Returns:
        tokenizer, model, image_processor, conv_mode.

    Raises:
        ValueError: the budget or the template is not valid; before anything is loaded. For the rest see
            :func:`llava.model.builder.load_pretrained_model`.
    """
    name = get_model_name_from_path(args.model_path)
    conv_mode = args.conv_mode or conv_mode_for(name)
    new_conversation(conv_mode)  # checks it
    budget = {key: getattr(args, key, None) for key in ("dominant", "contextual")}
    given = {key: value for key, value in budget.items() if value is not None}
    VisionZipConfig(**given)
    if vanilla and given:
        raise ValueError(f"--vanilla keeps all visual tokens, but a budget was given too ({given}): choose one")
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        load_8bit=getattr(args, "load_8bit", False),
        load_4bit=getattr(args, "load_4bit", False),
        device=getattr(args, "device", None),
    )
    if vanilla:
        unzip(model)
    elif given or vanilla is False:
        visionzip(model, **given)
    return tokenizer, model, image_processor, conv_mode


def sampling(temperature: float, **kwargs: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for a temperature (0 is greedy), and ``kwargs``.

    Raises:
        ValueError: the temperature is below 0.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0: use 0 for greedy decoding")
    return {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {}), **kwargs}


def run_command(name: str, command: Callable[[Any], Any], args: Any) -> int:
    """Run a command; bad input becomes one line on standard error and exit status 2, as argparse has it."""
    try:
        command(args)
    except (ValueError, OSError, ImportError) as error:
        # Of what other libraries write, such as a model that is fetched, the error may not say where.
        unnamed = full_disk(error) and not isinstance(error, WriteError)
        where = f" (in the output, in {HF_HOME} or in {tempfile.gettempdir()}): make room there" if unnamed else ""
        sys.stderr.write(f"{name}: {error}{where}\n")  # in one piece: other processes say the same at the same time
        return 2
    return 0

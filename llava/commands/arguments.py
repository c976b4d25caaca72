"""What the commands share: flags that say the same everywhere, and the model that they name."""

from __future__ import annotations

import argparse
import math
from typing import Any, get_args

import torch

from llava.commands.parsers import finite, positive
from llava.conversation import conv_templates
from llava.model.checkpoints.loading import check_device
from llava.video import FRAMES
from visionzip import VisionZipConfig
from visionzip.config import Positions
from visionzip.methods import METHODS, method_of

DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser, unzipped: str, model: str | None = None) -> None:
    """Flags that say which model to load, how, and how to zip it, for :func:`load_from_arguments`.

    Args:
        parser: gets them.
        unzipped: what holds without a budget, for ``--help``.
        model: the checkpoint that is loaded if none is named; without one, one must be.
    """
    parser.add_argument("--model-path", required=model is None, default=model, help="checkpoint: folder or hub name")
    parser.add_argument(
        "--model-base", help="of a projector or LoRA checkpoint, the model it completes (default: it is whole)"
    )
    parser.add_argument(
        "--conv-mode", choices=sorted(conv_templates), help="prompt template (default: by the model's name)"
    )
    add_device_argument(parser)
    parser.add_argument("--load-8bit", action="store_true", help="quantise the language model to 8 bits")
    parser.add_argument("--load-4bit", action="store_true", help="quantise the language model to 4 bits")
    add_budget_arguments(parser, note=f" (default: {unzipped})")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """The flag ``--device``; :func:`device_of` reads it."""
    parser.add_argument(
        "--device", metavar="NAME", help="cuda, cuda:1, cpu, … (default: cuda if there is any, else cpu)"
    )


def device_of(args: Any) -> str:
    """The device that ``--device`` names, or the default one.

    Raises:
        ValueError: there is none of that name here.
    """
    name = getattr(args, "device", None)
    return check_device(name or ("cuda" if torch.cuda.is_available() else "cpu"), flag=name is not None)


def add_budget_arguments(
    parser: argparse.ArgumentParser, default: tuple[int, int] | None = None, note: str = ""
) -> None:
    """VisionZip's two counts; ``note``: what holds without them, where ``default`` does not say it."""
    dominant, contextual = default or (None, None)
    parser.add_argument(
        "--dominant",
        type=int,
        default=dominant,
        metavar="K",
        help=f"VisionZip: tokens to keep per tile, CLS included{note}",
    )
    parser.add_argument(
        "--contextual",
        type=int,
        default=contextual,
        metavar="M",
        help=f"VisionZip: tokens per tile to merge the rest into{note}",
    )


def add_language_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of how the language model takes a setting's tokens, for :func:`setting_of`."""
    parser.add_argument(
        "--positions",
        choices=get_args(Positions),
        help="VisionZip: where kept tokens stand in the language model; original: where they would be if all were "
        "there (default: the method's own)",
    )
    parser.add_argument(
        "--size-bias",
        action=argparse.BooleanOptionalAction,
        help="VisionZip: a kept token's attention grows with the patches it stands for (default: the method's own)",
    )


def setting_of(args: Any) -> dict[str, Any]:
    """What the flags of a budget, a method and of how the language model takes it say, for ``visionzip``; checked.

    Raises:
        ValueError: a count is below its limit, ``--keep`` stands beside counts, or the method is unknown.
    """
    names = ("dominant", "contextual", "keep", "positions", "size_bias", "max_tokens", "min_tokens")
    setting = {name: getattr(args, name, None) for name in names} | {"method": getattr(args, "choose_by", None)}
    given = {name: value for name, value in setting.items() if value is not None}
    if "keep" in given and given.keys() & {"dominant", "contextual"}:
        raise ValueError(f"--keep {given['keep']} was given with --dominant or --contextual: give one or the other")
    method_of(VisionZipConfig(**given))  # checks both
    return given


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """How visual tokens are chosen (:data:`visionzip.methods.METHODS`), and how many; beside a model's flags."""
    parser.add_argument(
        "--method",
        dest="choose_by",  # commands that compare methods have a list of them as "method"
        metavar="NAME",
        help=f"how tokens are chosen: {', '.join(METHODS)} (default: visionzip)",
    )
    parser.add_argument(
        "--keep",
        type=count_or_share,
        metavar="T",
        help="tokens to keep per tile in all, or their share of the patches (0.25), in the place of --dominant and "
        "--contextual",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="T",
        help="most tokens per image, tile or frame of a share (default: none)",
    )
    parser.add_argument(
        "--min-tokens",
        type=positive,
        metavar="T",
        help="least tokens of a small image, tile or frame of a share (default: 1)",
    )


def count_or_share(text: str) -> int | float:
    """A flag's number of tokens (64) or share of the patches (0.25); argparse reports the error."""
    return int(text) if text.lstrip("-").isdigit() else finite(text)


def add_image_argument(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """The flag ``--image``, also by the name that LLaVA's chat has for it."""
    parser.add_argument(
        "--image",
        "--image-file",
        dest="image",
        nargs="+",
        action="extend",
        required=required,
        metavar="IMAGE",
        help=what,
    )


def add_frames_argument(parser: argparse.ArgumentParser) -> None:
    """The flag ``--frames`` of commands that read videos."""
    parser.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help=f"frames of each video (default: {FRAMES}; shorter videos repeat some)",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of how answers are made, for :func:`sampling`."""
    parser.add_argument("--temperature", type=finite, default=0.2, help="0 for greedy decoding")
    parser.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=positive, default=512, help="longest answer, in tokens"
    )


def add_tokens_argument(parser: argparse.ArgumentParser, per: str, default: str) -> None:
    """The flag ``--tokens``, which says the same in each command but for what it counts in.

    Args:
        parser: gets it.
        per: ``tile``, or ``image, all its tiles together``.
        default: what holds without it.
    """
    parser.add_argument(
        "--tokens",
        type=positive,
        nargs="+",
        default=[],
        metavar="T",
        help=f"visual tokens to keep per {per} (a LLaVA-1.5 image or a frame is one tile), CLS included; several: one "
        f"run each (default: {default})",
    )


def add_measuring_arguments(
    parser: argparse.ArgumentParser, rounds: int | None, dtype: str | None, note: str = ""
) -> None:
    """Flags of every ``visionzip benchmark``: how often, where, in what type, and where the results go.

    Args:
        parser: gets them.
        rounds: default of ``--rounds``; None leaves it out.
        dtype: default of ``--dtype``.
        note: of a ``dtype`` of None, what holds then.
    """
    if rounds is not None:
        parser.add_argument("--rounds", type=positive, default=rounds, metavar="N", help="timed rounds of all ways")
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"type of the weights{note}")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results (default: only printed)")


def add_batch_sizes(parser: argparse.ArgumentParser, default: list[int], what: str) -> None:
    """The flag ``--batch-size`` of a command that goes through several."""
    parser.add_argument(
        "--batch-size",
        "--batch-sizes",
        dest="batch_sizes",
        type=positive,
        nargs="+",
        default=default,
        metavar="N",
        help=f"{what}; several: one run each",
    )


def sampling(temperature: float, **kwargs: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for a temperature (0 is greedy), and ``kwargs``.

    Raises:
        ValueError: the temperature is below 0, infinite or no number.
    """
    if not math.isfinite(temperature):
        raise ValueError(f"temperature={temperature} is no finite number: use 0 for greedy decoding")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0: use 0 for greedy decoding")
    return {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {}), **kwargs}

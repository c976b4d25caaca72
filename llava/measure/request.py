"""What ``visionzip benchmark prefill``, ``generate`` and ``memory`` share: flags, checks, and the model they name."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from llava.commands.arguments import add_batch_sizes, add_measuring_arguments, add_tokens_argument
from llava.commands.loading import has_processor
from llava.commands.parsers import positive
from llava.measure.meters.runner import Way
from llava.measure.models.shapes import SHAPES, build_model
from llava.measure.report import check_request
from llava.methods import METHODS, detach, per_tile
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints.configs import config_values
from llava.model.stock.processor_model import load_model, load_processor

TIMED = ("vanilla", "visionzip", "fastv", "sparsevlm")  # where --method says nothing


def check_ways(args: argparse.Namespace) -> list[Way]:
    """Return the ways to measure; all that can be wrong is said here, before a model is built."""
    check_request(args)
    if args.shape and args.model_path:
        raise ValueError(f"--shape {args.shape} and --model-path {args.model_path}: give one of them")
    args.shape = None if args.model_path else args.shape or "llava-next-7b"
    tokens = args.tokens
    if args.model_path and not tokens:
        raise ValueError("--model-path needs --tokens too: visual tokens to keep per image, all its tiles together")
    if args.model_path and config_values(args.model_path).get("mm_vision_tower_aux"):
        raise ValueError(
            f"--model-path {args.model_path} is a Mini-Gemini, whose second tower and mining are no phases of these "
            "commands: use `visionzip benchmark mining`"
        )
    if args.transformers and args.model_path:
        raise ValueError("--transformers is about --shape: a checkpoint's own layout decides, so leave it out")
    own_processor = args.model_path is not None and has_processor(args.model_path)
    args.methods = args.methods or list(TIMED[:2] if own_processor else TIMED)
    if args.shape:
        shape = SHAPES[args.shape]
        tokens = tokens or [32 * shape.tiles if shape.tiles > 1 else 64]
        for number in tokens:
            per_tile(number, shape.tiles)
            if number >= shape.visual_tokens:
                raise ValueError(
                    f"--tokens {number}: {args.shape} has {shape.visual_tokens} visual tokens per image; give fewer"
                )
    ways = [Way(name, None) for name in ["vanilla"] if name in args.methods]
    ways += [Way(name, number) for number in tokens for name in args.methods if name != "vanilla"]
    if getattr(args, "compile", False):
        if "visionzip" not in args.methods:
            raise ValueError("--compile compiles VisionZip's prefill: have visionzip among --method")
        ways += [Way("visionzip", number, compiled=True) for number in tokens]
    return list(dict.fromkeys(ways))


def model_of(args: argparse.Namespace) -> Any:
    """Build or load the model, with no method on it."""
    dtype = getattr(torch, args.dtype)
    if args.shape:
        return build_model(args.shape, args.device, dtype, args.transformers)
    _, model, _, _ = load_pretrained_model(args.model_path, device=args.device, torch_dtype=dtype)
    detach(model)  # a tuned checkpoint comes zipped
    return model


def model_and_processor(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load a checkpoint of a model of transformers that is no LLaVA, with no method on it, and its processor.

    Raises:
        ValueError: something was asked for that is of LLaVA's families alone.
    """
    if getattr(args, "compile", False):
        raise ValueError(f"--compile is for LLaVA's families: {args.model_path} is of another, leave it out")
    processor = load_processor(args.model_path)
    return load_model(args.model_path, processor, args.device, getattr(torch, args.dtype)), processor


def title_of(args: argparse.Namespace) -> str:
    """Say in a line what is measured."""
    what = f"{args.shape}, random weights" if args.shape else args.model_path
    what = f"transformers' class, {what}" if args.transformers else what
    return f"{what}, {args.dtype}, {args.text_tokens} text tokens"


def setting_of(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the flags that are written beside the results."""
    names = ("shape", "transformers", "model_path", "methods", "dtype", "text_tokens", "rounds")
    return {name: getattr(args, name, None) for name in names}


def add_request_arguments(parser: argparse.ArgumentParser, rounds: int | None) -> None:
    """Add the flags that the three commands have; ``rounds``: default of ``--rounds``, None leaves it out."""
    parser.add_argument("--shape", choices=list(SHAPES), help="model of random weights (default: llava-next-7b)")
    parser.add_argument("--transformers", action="store_true", help="transformers' own class of that shape")
    parser.add_argument("--model-path", help="checkpoint instead of a shape: folder or hub name (default: a shape)")
    parser.add_argument(
        "--method",
        "--methods",
        dest="methods",
        nargs="+",
        choices=list(METHODS),
        help=f"ways to compare (default: {', '.join(TIMED)}; the first two of a model with a processor of its own)",
    )
    add_tokens_argument(parser, "image, all its tiles together", "160 of a LLaVA-NeXT, else 64")
    parser.add_argument("--text-tokens", type=positive, default=60, metavar="N", help="text tokens of the prompt")
    add_batch_sizes(parser, [1], "prompts at a time")
    add_measuring_arguments(parser, rounds, "bfloat16" if torch.cuda.is_available() else "float32")

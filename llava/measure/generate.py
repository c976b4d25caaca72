"""The commands ``visionzip benchmark prefill`` and ``generate``: from pixels to the first token, and to the last."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llava.commands.loading import has_processor
from llava.commands.parsers import positive
from llava.measure.latency import make_rows, plot, print_latency
from llava.measure.meters.processor import ProcessorRunner
from llava.measure.meters.runner import Runner, make_prompt, time_ways
from llava.measure.report import add_plot_argument, conclude, environment, write_results
from llava.measure.request import (
    add_request_arguments,
    check_ways,
    model_and_processor,
    model_of,
    setting_of,
    title_of,
)


def benchmark_prefill(args: argparse.Namespace) -> None:
    """Time the way from pixels to the first token, phase by phase and method by method, in interleaved rounds.

    "prefill" is the language model's forward alone, as the paper timed it; "first token" counts the vision tower, the
    compression and the projector too. Below the table: the prefill's gain beside that of the bare language model
    between the same two lengths.

    Raises:
        ValueError: a flag is not as it should be, or a method refuses the model, the budget or the batch.
        OSError: the checkpoint cannot be read.
    """
    _time(args, new_tokens=1)


def benchmark_generate(args: argparse.Namespace) -> None:
    """Time whole answers, from pixels to the last token, phase by phase and method by method.

    Raises:
        ValueError: a flag is not as it should be, or a method refuses the model, the budget or the batch.
        OSError: the checkpoint cannot be read.
    """
    _time(args, new_tokens=args.new_tokens)


def _time(args: argparse.Namespace, new_tokens: int) -> None:
    ways = check_ways(args)
    torch.manual_seed(0)
    own_processor = args.model_path is not None and has_processor(args.model_path)
    if own_processor:
        model, processor = model_and_processor(args)
    else:
        model = model_of(args)
    rows = []
    for batch in args.batch_sizes:
        if own_processor:
            runner = ProcessorRunner(model, processor, args.text_tokens, batch, args.image_edge, new_tokens)
        else:
            runner = Runner(model, make_prompt(model, args.text_tokens, batch), new_tokens)
        timed, bare = time_ways(runner, ways, args.rounds, bare=new_tokens == 1 and not own_processor)
        rows += make_rows(model, runner.prompt, timed, bare, new_tokens)
        report = {"setting": {**setting_of(args), "new_tokens": new_tokens}, "results": rows}
        if args.output:  # after each batch size: a larger one may not fit
            write_results(args.output, {**environment(args.device), **report})
    print_latency(rows, title_of(args))
    conclude(args, report)
    if args.plot:
        plot(rows, Path(args.plot), f"{title_of(args)}, {environment(args.device)['device']}")


def add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``visionzip benchmark prefill``."""
    _add_timing(parser)
    parser.add_argument("--compile", action="store_true", help="time VisionZip under torch.compile too (needs g++)")
    parser.set_defaults(run=benchmark_prefill)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``visionzip benchmark generate``."""
    _add_timing(parser)
    parser.add_argument(
        "--max-new-tokens",
        "--new-tokens",
        dest="new_tokens",
        type=positive,
        default=32,
        metavar="N",
        help="tokens of each answer, none of which ends before",
    )
    parser.set_defaults(run=benchmark_generate)


def _add_timing(parser: argparse.ArgumentParser) -> None:
    add_request_arguments(parser, rounds=5)
    parser.add_argument(
        "--image-edge",
        type=positive,
        default=1024,
        metavar="PIXELS",
        help="of the pictures for a checkpoint with a processor of its own, such as Qwen-VL",
    )
    add_plot_argument(parser, "latency against visual tokens")

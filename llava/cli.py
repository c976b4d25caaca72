"""The console script ``visionzip``."""

from __future__ import annotations

import argparse
import sys

from llava.arguments import run_command
from llava.benchmark import add_benchmark_arguments, benchmark
from llava.benchmark_tuning import add_tuning_arguments, benchmark_tuning
from llava.convert import add_convert_arguments, convert
from llava.efficiency.commands import (
    add_generate_arguments,
    add_memory_arguments,
    add_prefill_arguments,
    benchmark_generate,
    benchmark_memory,
    benchmark_prefill,
)
from llava.efficiency.frames import add_frames_arguments, benchmark_frames
from llava.efficiency.mining import add_mining_arguments, benchmark_mining
from llava.merge import add_merge_arguments, merge
from llava.serve.cli import add_chat_arguments, chat
from llava.visualize import add_visualize_arguments, visualize
from visionzip import __version__


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status (2 for bad input, as argparse has it)."""
    parser = argparse.ArgumentParser(
        "visionzip", description="VisionZip (CVPR 2025): a vision-language model on a fraction of its visual tokens."
    )
    parser.add_argument("--version", action="version", version=f"visionzip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    chat_parser = commands.add_parser(
        "chat", help="talk about images and videos in the terminal", description=chat.__doc__
    )
    add_chat_arguments(chat_parser)
    chat_parser.add_argument("--vanilla", action="store_true", help="keep all visual tokens")
    chat_parser.set_defaults(run=chat)

    visualize_parser = commands.add_parser(
        "visualize", help="draw what is kept and merged of an image", description=visualize.__doc__
    )
    add_visualize_arguments(visualize_parser)
    visualize_parser.set_defaults(run=visualize)

    benchmark_parser = commands.add_parser("benchmark", help="measure what compression costs and gains")
    benchmarks = benchmark_parser.add_subparsers(dest="what", required=True)
    tower_parser = benchmarks.add_parser(
        "tower", help="the vision encoder with and without compression", description=benchmark.__doc__
    )
    add_benchmark_arguments(tower_parser)
    tower_parser.set_defaults(run=benchmark)
    for what, summary, add_arguments, command in (
        ("prefill", "from pixels to the first token", add_prefill_arguments, benchmark_prefill),
        ("generate", "from pixels to the last token", add_generate_arguments, benchmark_generate),
        ("memory", "peak memory and KV cache of a prefill", add_memory_arguments, benchmark_memory),
        ("frames", "time and memory of videos with more and more frames", add_frames_arguments, benchmark_frames),
        (
            "mining",
            "Mini-Gemini's patch info mining, of all patches and of the kept ones",
            add_mining_arguments,
            benchmark_mining,
        ),
    ):
        each = benchmarks.add_parser(what, help=summary, description=command.__doc__)
        add_arguments(each)
        each.set_defaults(run=command)
    tuning_parser = benchmarks.add_parser(
        "tuning",
        help="a step of projector tuning, zipped, cached, both or neither",
        description=benchmark_tuning.__doc__,
    )
    add_tuning_arguments(tuning_parser)
    tuning_parser.set_defaults(run=benchmark_tuning)

    merge_parser = commands.add_parser(
        "merge", help="a tuned projector or LoRA and its base as one checkpoint", description=merge.__doc__
    )
    add_merge_arguments(merge_parser)
    merge_parser.set_defaults(run=merge)

    convert_parser = commands.add_parser(
        "convert", help="a checkpoint in transformers' layout, or in LLaVA's own", description=convert.__doc__
    )
    add_convert_arguments(convert_parser)
    convert_parser.set_defaults(run=convert)

    commands.add_parser("eval", help="benchmarks: accuracy, errors and cost of methods and budgets")
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["eval"]:  # its own parser takes the rest
        from visionzip_eval.__main__ import main as evaluate  # noqa: PLC0415 - nothing else here needs it

        return evaluate(words[1:])

    args = parser.parse_args(words)
    return run_command(f"visionzip {args.command}", args.run, args)


if __name__ == "__main__":
    sys.exit(main())

"""The command: list what there is, fetch or check data, run a benchmark, score answers, write tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llava.commands.arguments import (
    add_device_argument,
    add_frames_argument,
    add_language_arguments,
    add_model_arguments,
    add_tokens_argument,
)
from llava.commands.parsers import Commands, positive, run_commands
from llava.commands.screen import print_table
from llava.conversation import conv_templates
from llava.methods import METHODS
from llava.storage.files import write_atomically

from . import COMMAND
from .config import RunConfig
from .prepare import prepare
from .registry import BENCHMARKS
from .reports.leaderboard import TOKENS, default_methods, leaderboard
from .reports.paper import paper_table
from .reports.table import write_table
from .running.answer_files import read_answers
from .running.data import data_of, judge_of
from .running.runner import run
from .running.scoring import unscored
from .scoring.judge import ATTEMPTS
from .scoring.matching import shortfalls

GOES_ON = "interrupted: the same command goes on from here"


def show_list(args: argparse.Namespace) -> None:
    """Print the benchmarks."""
    print_table("benchmarks", ("", ""), [(name, entry.summary) for name, entry in BENCHMARKS.items()])


def show_methods(args: argparse.Namespace) -> None:
    """Print the methods that ``--method`` takes, with one line about each and the paper it is from."""
    print_table("methods", ("", "", ""), [(name, each.summary, each.paper) for name, each in METHODS.items()])


def answer(args: argparse.Namespace) -> None:
    """Answer a benchmark's questions with each method at each budget, and write a table of scores and cost."""
    run(RunConfig.from_flags(args))


def score(args: argparse.Namespace) -> None:
    """Score answers that are there already, as the official tool does.

    Raises:
        ValueError: the answers or the data are not as they should be, or only a server or a judge can score them.
        OSError: a file is missing or damaged.
    """
    benchmark = BENCHMARKS[args.benchmark]
    notes: dict[str, Any] = {}
    if args.graded:
        if benchmark.graded is None:
            raise ValueError(f"--graded: {benchmark.name} has no graded files; give --answers")
        folder = Path(args.data) if args.data else None
        result = benchmark.graded(Path(args.graded), folder)
    else:
        if not args.answers:
            raise ValueError("give --answers FILE" + (", or --graded FILE" if benchmark.graded else ""))
        answers, notes = read_answers(Path(args.answers))
        judge = judge_of(benchmark, args.judge, Path(args.output).parent / "judged", args.judge_attempts)
        if why := unscored(benchmark, judge):
            raise ValueError(f"{benchmark.name} is not scored from answers alone: {why}")
        result = benchmark.score(answers, data_of(benchmark, args).truth(), judge)
    details = {**result.details, **({"parts": dict(result.parts)} if result.parts else {}), **notes}
    incomplete = shortfalls(details, benchmark.missing)
    record = {
        "benchmark": benchmark.name,
        "metric": result.metric,
        "score": result.score,
        "incomplete": incomplete,
        "details": details,
    }
    write_atomically(Path(args.output), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"{benchmark.name}: {result.score:.4f} ({result.metric}){', incomplete:' if incomplete else ''}")
    for sentence in incomplete:
        print(f"  {sentence}")
    if repeated := details.get("repeated"):
        print(f"  {repeated} answers are to questions that others are to as well")


def show_table(args: argparse.Namespace) -> None:
    """Write ``table.md`` again from a run's folder, or print a table of the paper beside the results in a folder."""
    if args.paper is None:
        if args.folder is None:
            raise ValueError("give a run's folder, or --paper NUMBER")
        write_table(Path(args.folder))
    else:
        print(paper_table(args.paper, None if args.folder is None else Path(args.folder), args.format))


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """``eval list`` has no flags."""
    parser.set_defaults(run=show_list)


def add_methods_arguments(parser: argparse.ArgumentParser) -> None:
    """``eval methods`` has no flags."""
    parser.set_defaults(run=show_methods)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``eval prepare``."""
    parser.add_argument("benchmarks", nargs="+", choices=[*sorted(BENCHMARKS), "all"], help="what to look for")
    _add_data_arguments(parser)
    parser.set_defaults(run=prepare, data=None)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``eval run``."""
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="what to ask")
    add_model_arguments(parser, unzipped="--tokens, else the checkpoint's own")
    parser.add_argument(
        "--method", nargs="+", choices=list(METHODS), default=["vanilla", "visionzip"], help="ways to compare"
    )
    add_language_arguments(parser)
    add_tokens_argument(parser, "tile", "--dominant and --contextual, else the checkpoint's own")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many, for the method random")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions at a time")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first so many questions (default: all)")
    add_frames_argument(parser)
    parser.add_argument(
        "--skip-bad", action="store_true", help="count questions whose image or video is missing or damaged as wrong"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where the results go; a killed run goes on there"
    )
    _add_data_arguments(parser, own_folder=True)
    _add_judge_argument(parser)
    parser.set_defaults(run=answer, interrupted=GOES_ON)


def add_leaderboard_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``eval leaderboard``."""
    parser.add_argument("--model-path", default="checkpoints/llava-mini", help="checkpoint: folder or hub name")
    parser.add_argument(
        "--model-base", help="of a projector or LoRA checkpoint, the model it completes (default: none)"
    )
    parser.add_argument(
        "--conv-mode", choices=sorted(conv_templates), help="prompt template (default: by the model's name)"
    )
    add_device_argument(parser)
    add_language_arguments(parser)
    parser.add_argument(
        "--method", nargs="+", choices=list(METHODS), default=default_methods(), help="ways to compare (default: all)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        nargs="+",
        default=list(TOKENS),
        metavar="T",
        help="visual tokens to keep per tile, CLS included",
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many, for the method random")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first so many questions (default: all)")
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="that share the questions (default: one for each GPU; without any, two)",
    )
    parser.add_argument(
        "--output", default="docs/measured", metavar="FOLDER", help="where leaderboard.md, .json, .svg go"
    )
    parser.add_argument(
        "--runs",
        metavar="FOLDER",
        help="where the answers go; a killed command goes on there (default: results/leaderboard/MODEL)",
    )
    parser.set_defaults(run=leaderboard, benchmark="scenes", interrupted=GOES_ON)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``eval score``."""
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="what was asked")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="answers in LLaVA's, Video-LLaVA's or MMMU's format (default: none, --graded has them)",
    )
    parser.add_argument(
        "--graded",
        metavar="FILE",
        help="what the official judge has graded, of mmvet and llavabench (default: none, --answers are scored)",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file for the result")
    _add_data_arguments(parser, own_folder=True)
    _add_judge_argument(parser)
    parser.set_defaults(run=score)


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``eval table``."""
    parser.add_argument("folder", nargs="?", help="--output of a run; with --paper, a folder with several")
    parser.add_argument(
        "--paper", type=positive, metavar="N", help="number of a table of the VisionZip paper (default: the run's own)"
    )
    parser.add_argument("--format", choices=("markdown", "latex"), default="markdown", help="of a table of the paper")
    parser.set_defaults(run=show_table)


def _add_data_arguments(parser: argparse.ArgumentParser, own_folder: bool = False) -> None:
    if own_folder:
        parser.add_argument(
            "--data", metavar="FOLDER", help="the benchmark's data (default: its own folder below --data-root)"
        )
    parser.add_argument(
        "--data-root", metavar="FOLDER", help="LLaVA's folder of benchmarks (default: playground/data/eval)"
    )
    parser.add_argument(
        "--from-hub",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="the Hugging Face data set instead; or a local copy of it, or a folder with copies of several (default: "
        "the folders above)",
    )


def _add_judge_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge", help="model behind OPENAI_BASE_URL that judges, or 'exact', an offline proxy (default: none)"
    )
    parser.add_argument(
        "--judge-attempts",
        type=positive,
        default=ATTEMPTS,
        metavar="N",
        help="how often it is asked about one answer, until its reply can be read",
    )


COMMANDS: Commands = {
    "list": (add_list_arguments, "show the benchmarks"),
    "methods": (add_methods_arguments, "show the methods and their papers"),
    "prepare": (add_prepare_arguments, "check or fetch the data"),
    "run": (add_run_arguments, "answer, score and time"),
    "leaderboard": (add_leaderboard_arguments, "all methods on the scenes: table and plot"),
    "score": (add_score_arguments, "score an answers file"),
    "table": (add_table_arguments, "write a table"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status (2 for bad input, as argparse has it; 130 when interrupted)."""
    words = sys.argv[1:] if argv is None else argv
    return run_commands(COMMAND, COMMANDS, words, "Benchmarks of LLaVA models, zipped and not.")


if __name__ == "__main__":
    sys.exit(main())

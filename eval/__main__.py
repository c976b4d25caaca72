"""``python -m eval``: list what there is, fetch or check data, run a benchmark, score answers, write tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.answers import read_answers
from eval.data import DATA_ROOT, data_of, judge_of
from eval.methods import METHODS
from eval.paper import paper_table
from eval.prepare import prepare
from eval.registry import BENCHMARKS
from eval.runner import run, unscored
from eval.table import write_table
from llava.arguments import add_model_arguments, positive, run_command
from llava.files import write_atomically
from llava.video import FRAMES


def show_list(args: argparse.Namespace) -> None:
    """Print the benchmarks and the methods."""
    for title, entries in (("benchmarks", BENCHMARKS), ("methods", METHODS)):
        table = Table(title=title, show_header=False)
        for name, entry in entries.items():
            table.add_row(name, entry.summary)
        Console().print(table)


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
        judge = judge_of(benchmark, args.judge, Path(args.output).parent / "judged")
        if why := unscored(benchmark, judge):
            raise ValueError(f"{benchmark.name} is not scored from answers alone: {why}")
        result = benchmark.score(answers, data_of(benchmark, args).truth(), judge)
    record = {
        "benchmark": benchmark.name,
        "metric": result.metric,
        "score": result.score,
        "details": {**result.details, **({"parts": dict(result.parts)} if result.parts else {}), **notes},
    }
    write_atomically(Path(args.output), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"{benchmark.name}: {result.score:.4f} ({result.metric})")


def show_table(args: argparse.Namespace) -> None:
    """Write ``table.md`` again from a run's folder, or print a table of the paper beside the results in a folder."""
    if args.paper is None:
        if args.folder is None:
            raise ValueError("give a run's folder, or --paper NUMBER")
        write_table(Path(args.folder))
    else:
        print(paper_table(args.paper, None if args.folder is None else Path(args.folder), args.format))


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status (2 for bad input, as argparse has it; 130 when interrupted)."""
    parser = argparse.ArgumentParser("python -m eval", description="Benchmarks of LLaVA models, zipped and not.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show benchmarks and methods").set_defaults(run=show_list)

    prepare_parser = commands.add_parser("prepare", help="check or fetch the data", description=prepare.__doc__)
    prepare_parser.add_argument("benchmarks", nargs="+", metavar="benchmark", choices=[*sorted(BENCHMARKS), "all"])
    prepare_parser.set_defaults(run=prepare, data=None)

    run_parser = commands.add_parser("run", help="answer, score and time", description=run.__doc__)
    run_parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="what to ask")
    add_model_arguments(run_parser)
    run_parser.add_argument(
        "--method", nargs="+", choices=list(METHODS), default=["vanilla", "visionzip"], help="(vanilla visionzip)"
    )
    run_parser.add_argument("--tokens", type=positive, nargs="+", default=[], help="visual tokens per image or tile")
    run_parser.add_argument("--seeds", type=positive, default=3, help="how many, for the method random (3)")
    run_parser.add_argument("--batch-size", type=positive, default=8, help="questions at a time (8)")
    run_parser.add_argument("--limit", type=positive, help="only the first so many questions")
    run_parser.add_argument("--frames", type=positive, help=f"of each video ({FRAMES}; shorter ones repeat some)")
    run_parser.add_argument(
        "--skip-bad", action="store_true", help="count questions whose image or video is missing or damaged as wrong"
    )
    run_parser.add_argument("--output", required=True, help="folder of the results; a killed run goes on in it")
    run_parser.set_defaults(run=run)

    score_parser = commands.add_parser("score", help="score an answers file", description=score.__doc__)
    score_parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="what was asked")
    score_parser.add_argument("--answers", help="answers file: LLaVA's, Video-LLaVA's or MMMU's format")
    score_parser.add_argument("--graded", help="a file that the official judge has graded (mmvet, llavabench)")
    score_parser.add_argument("--output", required=True, help="json file to write")
    score_parser.set_defaults(run=score)

    for each in (run_parser, score_parser):
        each.add_argument("--data", help="the benchmark's folder (default: its own below --data-root)")
        each.add_argument("--judge", help="model behind OPENAI_BASE_URL that judges, or 'exact', an offline proxy")
    for each in (run_parser, score_parser, prepare_parser):
        each.add_argument("--data-root", help=f"LLaVA's folder of benchmarks ({DATA_ROOT})")
        each.add_argument(
            "--from-hub",
            nargs="?",
            const="",
            help="the Hugging Face data set instead; or a local copy of it, or a folder with copies of several",
        )

    table_parser = commands.add_parser("table", help="write a table", description=show_table.__doc__)
    table_parser.add_argument("folder", nargs="?", help="--output of a run; with --paper, a folder with several")
    table_parser.add_argument("--paper", type=positive, help="number of a table of the VisionZip paper")
    table_parser.add_argument("--format", choices=("markdown", "latex"), default="markdown", help="(markdown)")
    table_parser.set_defaults(run=show_table)

    args = parser.parse_args(argv)
    try:
        return run_command(f"python -m eval {args.command}", args.run, args)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

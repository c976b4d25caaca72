"""``python -m eval``: list what there is, run a benchmark, write its table again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.methods import METHODS
from eval.registry import BENCHMARKS
from eval.runner import run
from eval.table import write_table
from llava.arguments import add_model_arguments, positive, run_command


def show_list(args: argparse.Namespace) -> None:
    """Print the benchmarks and the methods."""
    for title, entries in (("benchmarks", BENCHMARKS), ("methods", METHODS)):
        table = Table(title=title, show_header=False)
        for name, entry in entries.items():
            table.add_row(name, entry.summary)
        Console().print(table)


def rewrite_table(args: argparse.Namespace) -> None:
    """Write ``table.md`` again from a folder's ``results.json``, and print it."""
    write_table(Path(args.folder))


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status (2 for bad input, as argparse has it; 130 when interrupted)."""
    parser = argparse.ArgumentParser("python -m eval", description="Benchmarks of LLaVA models, zipped and not.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show benchmarks and methods").set_defaults(run=show_list)

    run_parser = commands.add_parser("run", help="answer, score and time", description=run.__doc__)
    run_parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="what to ask")
    add_model_arguments(run_parser, budget=False)
    run_parser.add_argument(
        "--method",
        nargs="+",
        choices=list(METHODS),
        default=["vanilla", "visionzip"],
        help="default: vanilla visionzip",
    )
    run_parser.add_argument("--tokens", type=positive, nargs="+", default=[], help="visual tokens per image or tile")
    run_parser.add_argument("--seeds", type=positive, default=3, help="how many, for the method random (default: 3)")
    run_parser.add_argument("--batch-size", type=positive, default=64, help="questions at a time (default: 64)")
    run_parser.add_argument("--limit", type=positive, help="only the first so many questions")
    run_parser.add_argument("--data", help="the benchmark's file (default: where it lies under playground/data)")
    run_parser.add_argument("--output", required=True, help="folder of the results; a killed run goes on in it")
    run_parser.set_defaults(run=run)

    table_parser = commands.add_parser("table", help="write a table again", description=rewrite_table.__doc__)
    table_parser.add_argument("folder", help="--output of a run")
    table_parser.set_defaults(run=rewrite_table)

    args = parser.parse_args(argv)
    try:
        return run_command(f"python -m eval {args.command}", args.run, args)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

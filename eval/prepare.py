"""``python -m eval prepare``: is the data there, and if not, where does it come from?"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .benchmark import Benchmark
from .data import Data, data_of, missing_files
from .registry import BENCHMARKS


def prepare(args: argparse.Namespace) -> None:
    """Check a benchmark's data (every file, every image), or fetch it with ``--from-hub``; say what is missing.

    Raises:
        FileNotFoundError: something is missing or damaged; of which benchmarks.
    """
    names = args.benchmarks
    if "all" in names:
        names = [name for name in sorted(BENCHMARKS) if args.from_hub is None or BENCHMARKS[name].tables]
    console = Console()
    incomplete = [name for name in names if not _reported(BENCHMARKS[name], args, console)]
    if incomplete:
        raise FileNotFoundError(f"not complete: {', '.join(incomplete)}")


def _reported(benchmark: Benchmark, args: argparse.Namespace, console: Console) -> bool:
    """Whether it is complete; what is damaged is said, and does not keep the others from being looked at."""
    try:
        return _prepare(benchmark, args, console)
    except (ValueError, OSError) as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return False


def _prepare(benchmark: Benchmark, args: argparse.Namespace, console: Console) -> bool:
    data = data_of(benchmark, args)
    table = Table(title=f"{benchmark.name}: {data.name}", title_justify="left")
    complete = _files(data, table) if data.tables is None else _rows(data, table)
    if complete:
        questions = data.questions()
        missing, number = missing_files(questions)
        table.add_row("questions", str(len(questions)), "")
        if number:
            table.add_row("images or videos", f"{number - len(missing)} of {number}", ", ".join(missing[:3]))
        complete = not missing
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    return complete


def _files(data: Data, table: Table) -> bool:
    for column in ("below the folder", "", "where it comes from"):
        table.add_column(column, overflow="fold")
    if not data.benchmark.files:
        return True
    there = []
    for file in data.benchmark.files:
        path = data.folder / file.path
        there.append(path.is_dir() if file.path.endswith("/") else path.is_file())
        need = "" if file.needed == "both" else f" (only to {file.needed})"
        table.add_row(file.path, "there" if there[-1] else f"missing{need}", "" if there[-1] else file.source)
    return all(found or file.needed == "score" for found, file in zip(there, data.benchmark.files, strict=True))


def _rows(data: Data, table: Table) -> bool:
    for column in ("data set", "", ""):
        table.add_column(column, overflow="fold")
    for name, wanted in tqdm(data.benchmark.tables.items(), desc="fetch", unit="table"):
        rows = data.tables[name]
        table.add_row(f"{wanted.dataset} {wanted.config or ''} {wanted.split}", f"{len(rows)} rows", "")
    return True

"""``python -m eval prepare``: is the data there, and if not, where does it come from?"""

from __future__ import annotations

import argparse
import sys

from llava.commands.screen import print_table, track

from .benchmark import Benchmark
from .registry import BENCHMARKS
from .running.data import Data, data_of, missing_files


def prepare(args: argparse.Namespace) -> None:
    """Check a benchmark's data (every file, every image), or fetch it with ``--from-hub``; say what is missing.

    Raises:
        FileNotFoundError: something is missing or damaged; of which benchmarks.
    """
    names = args.benchmarks
    if "all" in names:
        names = [name for name in sorted(BENCHMARKS) if args.from_hub is None or BENCHMARKS[name].tables]
    incomplete = [name for name in names if not _reported(BENCHMARKS[name], args)]
    if incomplete:
        raise FileNotFoundError(f"not complete: {', '.join(incomplete)}")


def _reported(benchmark: Benchmark, args: argparse.Namespace) -> bool:
    """Whether it is complete; what is damaged is said, and does not keep the others from being looked at."""
    try:
        return _prepare(benchmark, args)
    except (ValueError, OSError) as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return False


def _prepare(benchmark: Benchmark, args: argparse.Namespace) -> bool:
    data = data_of(benchmark, args)
    lines: list[tuple[str, str, str]] = []
    complete = _files(data, lines) if data.tables is None else _rows(data, lines)
    if complete:
        questions = data.questions()
        missing, number = missing_files(questions)
        lines.append(("questions", str(len(questions)), ""))
        if number:
            lines.append(("images or videos", f"{number - len(missing)} of {number}", ", ".join(missing[:3])))
        complete = not missing
    print_table(f"{benchmark.name}: {data.name}", ("", "", ""), lines)
    return complete


def _files(data: Data, lines: list[tuple[str, str, str]]) -> bool:
    if not data.benchmark.files:
        return True
    there = []
    for file in data.benchmark.files:
        path = data.folder / file.path
        there.append(path.is_dir() if file.path.endswith("/") else path.is_file())
        need = "" if file.needed == "both" else f" (only to {file.needed})"
        lines.append((file.path, "there" if there[-1] else f"missing{need}", "" if there[-1] else file.source))
    return all(found or file.needed == "score" for found, file in zip(there, data.benchmark.files, strict=True))


def _rows(data: Data, lines: list[tuple[str, str, str]]) -> bool:
    for name, wanted in track(data.benchmark.tables.items(), len(data.benchmark.tables), "fetch", "tables"):
        rows = data.tables[name]
        lines.append((f"{wanted.dataset} {wanted.config or ''} {wanted.split}", f"{len(rows)} rows", ""))
    return True

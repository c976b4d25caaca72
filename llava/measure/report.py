"""The one report: rows of figures as a table, as JSON beside what they depend on, and as figures of matplotlib's.

A row is a dict that is ready for JSON; ``way`` says what it is about.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.commands.arguments import device_of
from llava.commands.screen import print_table, say
from llava.measure.meters.timing import Measurement
from llava.storage.files import write_atomically

PLOTS = (".png", ".svg", ".pdf")
Spread = dict[str, Any]
Row = dict[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]  # the name of each, and its cell of a row


def environment(device: str) -> dict[str, str]:
    """Describe what a figure depends on, to be written beside it."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU ({_processor()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    with suppress(OSError):  # Linux only
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return f"{platform.machine()}, {found[1]}"
    return platform.machine()


def spread(values: Sequence[float]) -> Spread:
    """Summarise some values as median and quartiles, which lie within them however few they are."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}


def ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Divide one way's values by another's, round by round."""
    return spread([one / other for one, other in zip(values, base, strict=True)])


def compare(
    batch: int, tokens: Mapping[str, int], times: Mapping[str, Measurement], memory: Mapping[str, Row]
) -> list[Row]:
    """Make a row of what each way takes, and of its ratio to what ``vanilla`` takes.

    Args:
        batch: images, or samples, at a time.
        tokens: visual tokens of an image, by way.
        times: of the ways in the same rounds; one is ``vanilla``.
        memory: ``memory_mib`` of each way.
    """
    rows = []
    for way, own in times.items():
        by_vanilla, peak = ratio(own.total, times["vanilla"].total), memory[way]["memory_mib"]
        rows.append(
            {
                "way": way,
                "batch": batch,
                "visual_tokens": tokens[way],
                "seconds": statistics.median(own.total),
                "time_ratio": by_vanilla["median"],
                "time_spread": by_vanilla["quartiles"],
                "memory_mib": peak,
                "memory_ratio": peak / memory["vanilla"]["memory_mib"],
            }
        )
    return rows


COMPARED: Columns = (  # of rows from compare()
    ("batch", lambda row: str(row["batch"])),
    ("way", lambda row: row["way"]),
    ("tokens", lambda row: str(row["visual_tokens"])),
    ("time", lambda row: f"{row['seconds'] * 1e3:.1f} ms"),
    ("ratio", lambda row: f"{row['time_ratio']:.3f}"),
    ("quartiles", lambda row: quartiles(row["time_spread"])),
    ("peak memory", lambda row: f"{row['memory_mib']:.0f} MiB"),
    ("ratio", lambda row: f"{row['memory_ratio']:.3f}"),
)


def quartiles(bounds: Sequence[float]) -> str:
    """Write two quartiles of a ratio."""
    return f"{bounds[0]:.3f}-{bounds[1]:.3f}"


def show(title: str, columns: Columns, rows: Sequence[Row], names: int = 1) -> None:
    """Print rows as a table.

    Args:
        title: above it.
        columns: of the table.
        rows: what the cells are made of.
        names: how many of the first columns say which row it is.
    """
    cells = [[cell(row) for _, cell in columns] for row in rows]
    print_table(title, [name for name, _ in columns], cells, left=("way", "what", "method"), names=names)


def explain(meanings: Mapping[str, str]) -> None:
    """Print what each way of a table is."""
    for way, meaning in meanings.items():
        say(f"{way}: {meaning}", "dim")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Collect a command's flags that JSON can hold."""
    return {key: value for key, value in vars(args).items() if isinstance(value, str | int | list)}


def conclude(args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Print what the figures depend on, and write it with them to ``args.output`` if that is given."""
    facts = environment(args.device)
    say(" · ".join(f"{key} {value}" for key, value in facts.items()), "dim")
    if args.output:
        write_results(args.output, {**facts, **content})


def write_results(path: str, results: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(Path(path), json.dumps(results, indent=1))


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib's, whole or not at all."""
    write_atomically(path, partial(figure.savefig, format=path.suffix[1:]))


def add_plot_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flag ``--plot``; :func:`check_request` checks it."""
    endings = ", ".join(PLOTS)
    parser.add_argument("--plot", metavar="FILE", help=f"figure of {what}, {endings} (default: none is drawn)")


def check_request(args: argparse.Namespace) -> None:
    """Settle ``--device``, and check ``--output`` and, if the command has it, ``--plot``, before the long work.

    Raises:
        ValueError: there is no such device here, or the plot is of no known type.
        IsADirectoryError: the output is a folder.
        ImportError: a plot is asked for and matplotlib is not installed.
    """
    args.device = device_of(args)
    if args.output and Path(args.output).is_dir():
        raise IsADirectoryError(f"--output {args.output} is a folder: give a file")
    if plot := getattr(args, "plot", None):
        if Path(plot).suffix not in PLOTS:
            raise ValueError(f"--plot {plot}: give a file that ends in {', '.join(PLOTS)}")
        import matplotlib  # noqa: F401, PLC0415 - an extra

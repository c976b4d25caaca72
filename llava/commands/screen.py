"""What commands show: tables that fit the terminal, and progress as a bar there and as plain lines in a log."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

T = TypeVar("T")
_BETWEEN_LINES = 10.0  # seconds, in a log
_JOINT = "\N{NO-BREAK SPACE}"  # between a column's name and its cell, which stay in one line


def console(stderr: bool = False) -> Console:
    """Where commands print; without any escape codes under NO_COLOR and where no terminal is."""
    return Console(stderr=stderr, highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


def say(text: str, style: str = "", out: Console | None = None) -> None:
    """Print some sentences: wrapped to a terminal, else a line each, as logs and ``grep`` want them."""
    out = out or console()
    out.print(Text(text, style=style), soft_wrap=not out.is_terminal)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Collection[str] = (),
    names: int = 1,
    out: Console | None = None,
) -> None:
    """Print a table, or where the terminal is too narrow for it, a few lines for each of its rows.

    Without a terminal it is as wide as it is, unless COLUMNS says how wide it may be.

    Args:
        title: above it.
        columns: names of the columns; all empty for none.
        rows: cells.
        left: columns of words, the others are numbers.
        names: how many of the first columns say which row it is.
        out: where to print (default: standard output).
    """
    out, rows = out or console(), list(rows)
    table = Table(show_header=any(columns))
    for column in columns:
        table.add_column(Text(column), justify="left" if column in left or not column else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    needed = Measurement.get(out, out.options.update(width=10_000, max_width=10_000), table).maximum
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = max(out.width, needed)
    say(title, "bold", out)
    if needed <= out.width:
        out.print(table)
        return
    for row in rows:
        cells = [_cell(column, cell, column in left) for column, cell in zip(columns, row, strict=True) if cell]
        facts = [_cell(column, cell, False) for column, cell in zip(columns[names:], row[names:], strict=True) if cell]
        lines = [" · ".join(cells[: len(cells) - len(facts)])]
        # A word that is longer than a line is an address, to be copied whole: the terminal itself wraps it.
        text, margin = f"{_JOINT}· ".join(facts), {"initial_indent": "  ", "subsequent_indent": "  "}
        lines += textwrap.wrap(text, out.width, break_long_words=False, break_on_hyphens=False, **margin)
        for line in lines:
            out.print(Text(line.replace(_JOINT, " ")), soft_wrap=True)


def _cell(column: str, cell: str, is_name: bool) -> str:
    whole = cell if is_name or not column else f"{column} {cell}"
    return whole.replace(" ", _JOINT) if len(whole) < 40 else whole


class _Lines(AbstractContextManager):
    """Stands for tqdm where no terminal is: a line now and then, and one at the end."""

    def __init__(self, total: int, label: str, unit: str, done: int) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, done
        self.start = self.shown_at = time.monotonic()
        self.shown = done

    def set_description(self, label: str) -> None:
        """Name what is worked at."""
        self.label = label

    def update(self, number: int = 1) -> None:
        """Count some more."""
        self.done += number
        if time.monotonic() - self.shown_at >= _BETWEEN_LINES:
            self._show()

    def _show(self) -> None:
        self.shown, self.shown_at = self.done, time.monotonic()
        seconds = self.shown_at - self.start
        sys.stderr.write(f"{self.label}: {self.done}/{self.total} {self.unit}, {seconds:.0f} s\n")
        sys.stderr.flush()

    def __exit__(self, *error: object) -> None:
        if self.shown != self.done:
            self._show()


def progress(total: int, label: str, unit: str, done: int = 0, hidden: bool = False) -> Any:
    """A bar on standard error, or plain lines where that is no terminal; with tqdm's ``update`` and descriptions.

    Args:
        total: how many there are.
        label: what is worked at.
        unit: what is counted, in the plural.
        done: how many are done already.
        hidden: nothing is shown (other processes do that).
    """
    if hidden or sys.stderr.isatty():
        shown = {"desc": label, "unit": f" {unit}", "smoothing": 0.05, "dynamic_ncols": True}
        return tqdm(total=total, initial=done, disable=hidden, **shown)
    return _Lines(total, label, unit, done)


def track(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """Go through some items and show how far it is."""
    with progress(total, label, unit) as bar:
        for item in items:
            yield item
            bar.update()

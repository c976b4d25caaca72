"""The paper's tables as they are printed: read from ``paper.json``, checked, and compared with vanilla."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reading.sources import need, read_json

AVERAGE = "Avg."
_FILE = Path(__file__).with_name("paper.json")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: as printed.
        benchmark: ours; None for times and memory, which have a unit.
        variant: which of the benchmark's scores, where it is not the headline: SEED of all questions, or of images.
        unit: of what is no benchmark.
    """

    name: str
    benchmark: str | None = None
    variant: str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table, as printed.

    Attributes:
        tokens: visual tokens, of all tiles or frames together.
        label: the method as printed; ``‡`` has a tuned projector.
        method: ours.
        values: of the columns; None where nothing is printed.
        average: percent of vanilla.
        percent: printed percent of vanilla, of each column; empty where none are known.
        misprints: the right percent of a column (or of the average) whose printed one is not what the scores give.
        model: the table's, but for a row that compares another.
        tuned: the projector is tuned.
        ours: False where no run of ours can stand for it (a model trained or quantised otherwise).
    """

    tokens: int
    label: str
    method: str
    values: tuple[str | None, ...]
    average: str | None = None
    percent: tuple[str | None, ...] = ()
    misprints: Mapping[str, str] | None = None
    model: str | None = None
    tuned: bool = False
    ours: bool = True

    def value(self, column: int) -> float | None:
        """A score as a number."""
        printed = self.values[column]
        return None if printed is None else float(printed.replace(",", ""))


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: the paper's.
        title: what it is about.
        model: of its rows, the last part of the name on the hub, in lower case.
        sources: where the numbers are from: marks of the reference notes, and what they mean.
        columns: without those of tokens, method and average.
        rows: as printed.
        vanilla: what the others are compared with; not always one of the rows.
        tiles: of an image, or frames of a video, over which tokens are counted.
        not_in_average: columns.
        notes: what one should know about it.
    """

    number: int
    title: str
    model: str
    sources: Mapping[str, str]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    vanilla: Row
    tiles: int = 1
    not_in_average: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def ratios(self, values: Sequence[float | None], vanilla: Sequence[float | None]) -> list[float | None]:
        """Percent of vanilla; None in columns that are no benchmark, and where either is missing."""
        return [
            100 * value / whole if column.benchmark and value is not None and whole else None
            for column, value, whole in zip(self.columns, values, vanilla, strict=True)
        ]

    def average(self, ratios: Sequence[float | None]) -> float | None:
        """The mean over the columns that count; None where one is missing."""
        counted = [
            ratio
            for column, ratio in zip(self.columns, ratios, strict=True)
            if column.benchmark and column.name not in self.not_in_average
        ]
        return statistics.fmean(counted) if counted and None not in counted else None

    def paper_ratios(self, row: Row) -> list[float | None]:
        """A printed row's percent of vanilla, from its raw scores."""
        places = range(len(self.columns))
        return self.ratios([row.value(place) for place in places], [self.vanilla.value(place) for place in places])


def load_paper(path: Path = _FILE) -> dict[int, PaperTable]:
    """The paper's tables by number.

    Raises:
        ValueError: the file contradicts itself.
    """
    content = read_json(path)
    tables: dict[int, PaperTable] = {}
    for entry in content["tables"]:
        where = f"table {entry['number']} of {path}"
        table = _table(entry, content["marks"], tables, where)
        _check(table, where)
        if table.number in tables:
            raise ValueError(f"{path} has table {table.number} twice")
        tables[table.number] = table
    return tables


def _table(
    entry: Mapping[str, Any], marks: Mapping[str, str], earlier: Mapping[int, PaperTable], where: str
) -> PaperTable:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    sources = {mark: need(marks, mark, f"the marks of {where}") for mark in fields.pop("source").split("+")}
    columns = tuple(Column(**column) for column in fields.pop("columns"))
    rows = tuple(
        Row(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
        for row in fields.pop("rows")
    )
    if (of := fields.pop("vanilla_of", None)) is not None:
        if [column.name for column in earlier[of].columns] != [column.name for column in columns]:
            raise ValueError(f"{where} has not the columns of table {of}")
        vanilla = earlier[of].vanilla
    else:
        own = [row for row in rows if row.method == "vanilla" and row.model is None]
        if not own:
            raise ValueError(f"{where} has no vanilla row")
        vanilla = own[0]
    return PaperTable(sources=sources, columns=columns, rows=rows, vanilla=vanilla, **fields)


def _check(table: PaperTable, where: str) -> None:
    names = [column.name for column in table.columns]
    if unknown := set(table.not_in_average) - set(names):
        raise ValueError(f"{where} has no column {unknown.pop()!r}")
    for column in table.columns:
        if (column.benchmark is None) == (column.unit is None):
            raise ValueError(f"{where}: the column {column.name} needs a benchmark or a unit")
    for row in (*table.rows, table.vanilla):
        here = f"{where}, {row.label} at {row.tokens}"
        if len(row.values) != len(names) or len(row.percent) not in (0, len(names)):
            raise ValueError(f"{here}: {len(row.values)} scores, {len(row.percent)} percent for {len(names)} columns")
        for printed in filter(None, (*row.values, *row.percent, row.average)):
            if not re.fullmatch(r"\d[\d,]*(\.\d+)?", printed):
                raise ValueError(f"{here}: {printed!r} is no number")
        printed = {AVERAGE: row.average, **dict(zip(names, row.percent, strict=False))}
        if wrong := [name for name in row.misprints or {} if printed.get(name) is None]:
            raise ValueError(f"{here}: {wrong[0]} cannot be misprinted, nothing is printed there")

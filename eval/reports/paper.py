"""The tables of the VisionZip paper, arXiv 2412.04467, beside our results.

``paper.json`` has what is printed: every table with numbers that our runs could have, with the source of each (marks)
and its misprints. An average is the mean of the ratios to the vanilla row (Tables 10 and 11 leave out MM-Vet and
LLaVA-Bench); it is computed here from the raw scores, and what is printed stands beside it where it differs.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.video import FRAMES

from .. import COMMAND
from ..reading.sources import need, read_json
from .paper_styles import MISSING, STYLES

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


@dataclass(frozen=True)
class Result:
    """A row of one of our result files.

    Attributes:
        benchmark: name.
        model: last part of its name, in lower case.
        method: name.
        tokens: of each image, tile or frame; None are all.
        tuned: the projector is tuned.
        score: the headline.
        variants: further scores by name.
        file: where it is from.
    """

    benchmark: str
    model: str
    method: str
    tokens: int | None
    tuned: bool
    score: float
    variants: Mapping[str, Any]
    file: Path


def paper_table(number: int, results: Path | None, style: str) -> str:
    """A table of the paper beside our results, as text.

    Args:
        number: the paper's.
        results: folder with our result files, at any depth; None shows the paper alone.
        style: ``markdown`` or ``latex``.

    Raises:
        ValueError: there is no such table, or results contradict each other.
        FileNotFoundError: there is no such folder.
    """
    tables = load_paper()
    if number not in tables:
        raise ValueError(f"--paper {number}: there are tables {', '.join(map(str, tables))}")
    found, remarks = load_results(results) if results is not None else ([], [])
    return render(tables[number], found, remarks, style)


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


def load_results(folder: Path) -> tuple[list[Result], list[str]]:
    """Our results below a folder: of every json file with benchmark, model and rows.

    Returns:
        the results; and remarks on them: which the judge has not judged whole, and what is left out, with the reason
        (runs over a part of a benchmark, with another number of frames, with the proxy judge, or with another share of
        dominant tokens than the paper's).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a result file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give one with results of `{COMMAND} run`")
    results, remarks = [], []
    for path in sorted(folder.rglob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or not {"benchmark", "model", "rows"} <= set(content):
            continue
        if reason := _why_not(content):
            remarks.append(f"Left out: {path.relative_to(folder)} ({reason}).")
            continue
        model = str(content["model"]).rstrip("/").rpartition("/")[2].lower()
        for row in content["rows"]:
            method = need(row, "method", f"a row of {path}")
            if not _has_papers_split(row):
                split = f"{row['dominant']}+{row['contextual']}"
                remarks.append(f"Left out: {path.relative_to(folder)}, {method} {split} (not the paper's split).")
            elif row.get("score") is not None:  # otherwise only a server can tell
                if row.get("unjudged"):
                    row_name = " ".join(map(str, filter(None, (method, row.get("tokens")))))
                    remarks.append(f"{path.relative_to(folder)}, {row_name}: {row['metric']}.")
                results.append(
                    Result(
                        benchmark=content["benchmark"],
                        model=model,
                        method=method,
                        tokens=row.get("tokens"),
                        tuned=bool(content.get("tuned", False)),
                        score=float(row["score"]),
                        variants={**row.get("details", {}), **row.get("parts", {})},
                        file=path,
                    )
                )
    return results, remarks


def _why_not(content: Mapping[str, Any]) -> str | None:
    if content.get("limited"):
        return "only a part of the questions"
    if (frames := content.get("setting", {}).get("frames")) not in (None, FRAMES):
        return f"{frames} frames of each video, not {FRAMES}"
    return "judged by the offline proxy" if content.get("judge") == "exact" else None


def _has_papers_split(row: Mapping[str, Any]) -> bool:
    """VisionZip's dominant to contextual tokens are 27 to 5, where the paper tells (not for Video-LLaVA's 17)."""
    if row["method"] != "visionzip" or row.get("dominant") is None or not row.get("tokens") or row["tokens"] % 32:
        return True
    return 5 * row["dominant"] == 27 * row["contextual"]


def find(results: Iterable[Result], table: PaperTable, row: Row, column: Column) -> float | None:
    """Our score in a cell, None if there is none.

    Raises:
        ValueError: two runs give different ones.
    """
    if column.benchmark is None or not row.ours:
        return None
    tokens, rest = (None, 0) if row.method == "vanilla" else divmod(row.tokens, table.tiles)
    if rest:  # 135 tokens for eight frames
        return None
    key = (column.benchmark, row.model or table.model, row.method, tokens, row.tuned)
    found: dict[float, Path] = {}
    for result in results:
        if key == (result.benchmark, result.model, result.method, result.tokens, result.tuned):
            score = _variant(result, column.variant)
            if score is not None:
                found.setdefault(score, result.file)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"two results for {column.name}, {row.label} at {row.tokens} tokens: {one:g} in {first} and {other:g} in "
            f"{second}; move one of them out of the folder"
        )
    return next(iter(found), None)


def _variant(result: Result, name: str | None) -> float | None:
    if name is None:
        return result.score
    if name == "all" and "video" not in result.variants:  # the hub's SEED-Bench is asked about images alone
        return None
    score = result.variants.get(name)
    return score if isinstance(score, int | float) else None


# Rendering. A row of the paper becomes lines: what it prints, percent of vanilla, the same of ours, and the difference.


def render(table: PaperTable, results: Sequence[Result], remarks: Sequence[str], style: str) -> str:
    """A table as markdown or LaTeX (with ``booktabs``); see :func:`paper_table`."""
    if style not in STYLES:
        raise ValueError(f"--format {style}: there are {', '.join(STYLES)}")
    averaged = any(row.average is not None for row in table.rows)
    header = ["tokens", "method", "", *(_heading(column) for column in table.columns), *[f"{AVERAGE} %"] * averaged]
    whole = [find(results, table, table.vanilla, column) for column in table.columns]
    groups = []
    for row in table.rows:
        lines = _lines(table, row, [find(results, table, row, column) for column in table.columns], whole)
        width = len(header) - 3
        first, *others = [[name, *cells[:width]] for name, *cells in lines]
        groups.append([[str(row.tokens), row.label, *first], *(["", "", *line] for line in others)])
    return STYLES[style](table.number, table.title, header, groups, [*_remarks(table), *remarks])


def _lines(table: PaperTable, row: Row, ours: Sequence[float | None], whole: Sequence[float | None]) -> list[list[str]]:
    """The lines of a row: name, cells, average. Those that would be empty are left out, but for "ours"."""
    paper = [row.value(place) for place in range(len(table.columns))]
    paper_ratios, our_ratios = table.paper_ratios(row), table.ratios(ours, whole)
    paper_average, our_average = table.average(paper_ratios), table.average(our_ratios)
    misprints = row.misprints or {}
    percent = [
        _beside(_number(ratio), printed if column.name in misprints else None)
        for column, ratio, printed in zip(table.columns, paper_ratios, row.percent or [None] * len(paper), strict=True)
    ]
    if paper_average is None:  # of columns that this table has not
        shown_average = row.average or MISSING
    else:
        differs = row.average is not None and f"{paper_average:.1f}" != f"{float(row.average):.1f}"
        shown_average = _beside(_number(paper_average), row.average if differs else None)
    lines = [["paper", *(value or MISSING for value in row.values), shown_average]]
    compared = row is not table.vanilla
    if compared and any(paper_ratios):
        lines.append(["paper %", *percent, ""])
    lines.append(["ours", *map(_number, ours), _number(our_average)])
    if compared and any(our_ratios):
        lines.append(["ours %", *map(_number, our_ratios), ""])
    if any(value is not None for value in ours):
        pairs = [*zip(ours, paper, strict=True), (our_average, paper_average)]
        lines.append(["difference", *(_number(None if None in pair else pair[0] - pair[1], "+z") for pair in pairs)])
    return lines


def _heading(column: Column) -> str:
    return f"{column.name} ({column.unit})" if column.unit else column.name


def _number(value: float | None, sign: str = "") -> str:
    return MISSING if value is None else f"{value:{sign}.1f}"


def _beside(computed: str, printed: str | None) -> str:
    return computed if printed is None else f"{computed} (printed {printed})"


def _remarks(table: PaperTable) -> list[str]:
    """What stands below a table, whatever our results are."""
    remarks = [f"Source: {'; '.join(f'{mark}, {meaning}' for mark, meaning in table.sources.items())}."]
    if any(column.benchmark for column in table.columns):
        remarks.append("%: of vanilla, from the raw scores.")
        if any(row.average is not None for row in table.rows):
            but = f", without {' and '.join(table.not_in_average)}" if table.not_in_average else ""
            remarks.append(f"{AVERAGE}: mean of these over the columns{but}.")
    if table.tiles > 1:
        remarks.append(f"Tokens are those of {table.tiles} tiles or frames together; our runs count those of one.")
    return [*remarks, *table.notes]

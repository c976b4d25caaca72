"""The tables of the VisionZip paper, arXiv 2412.04467, beside our results.

``paper.json`` has what is printed: every table with numbers that our runs could have, with the source of each (marks)
and its misprints. An average is the mean of the ratios to the vanilla row (Tables 10 and 11 leave out MM-Vet and
LLaVA-Bench); it is computed here from the raw scores, and what is printed stands beside it where it differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .paper_results import Result, find, load_results
from .paper_styles import MISSING, STYLES
from .paper_tables import AVERAGE, Column, PaperTable, Row, load_paper


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

"""The paper's tables: what is printed agrees with itself but for known misprints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.registry import BENCHMARKS
from eval.reports.paper_tables import AVERAGE, PaperTable, Row, load_paper

ROOT = Path(__file__).resolve().parents[2]
PAPER = load_paper()
ROUNDING = 0.1  # printed averages are of printed, rounded percentages, some of which are cut rather than rounded
ROWS = [(table, row) for table in PAPER.values() for row in table.rows]


def name_of(row: Row) -> str:
    return f"{row.label} {row.tokens}"


def row_of(table: PaperTable, label: str, tokens: int) -> Row:
    (row,) = (row for row in table.rows if (row.label, row.tokens) == (label, tokens))
    return row


def test_tables():
    assert list(PAPER) == [1, 2, 3, 4, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert sum(len(table.rows) for table in PAPER.values()) == 90
    benchmarks = {column.benchmark for table in PAPER.values() for column in table.columns} - {None}
    assert benchmarks == set(BENCHMARKS) - {"scenes", "mmbench_cn"}


def test_values_are_as_printed():
    table = PAPER[1]
    assert [column.benchmark for column in table.columns] == (
        ["gqa", "mmbench", "mme", "pope", "sqa", "vqav2", "textvqa", "mmmu", "seed", "mmvet", "llavabench"]
    )
    assert row_of(table, "VisionZip", 192).values[2] == "1782.6"
    assert row_of(table, "SparseVLM", 128).values[9] == "30"
    assert row_of(PAPER[7], "13B†", 640).values == ("1,246", "62.2") and row_of(PAPER[7], "7B", 2880).value(0) == 1714
    assert row_of(PAPER[3], "VisionZip", 136).values == ("42.4", "63.5", "52.1", "43.0")
    assert row_of(PAPER[4], "VisionZip", 160).values == ("756", "3.0", "27.8", "7.8")
    assert row_of(PAPER[18], "Vanilla 7B", 2880).values == ("54", "1598")
    assert row_of(PAPER[17], "VisionZip, inference only", 640).values[:3] == (None, None, "61.3")
    assert row_of(PAPER[11], "VisionZip-Train", 192).values[9:11] == ("33", "52.6")


def test_seed_is_of_all_questions_for_llava_15_7b_alone():
    """58.6 has LLaVA's video questions; from Table 10 on it is SEED-I, images only."""
    variants = {
        table.number: column.variant
        for table in PAPER.values()
        for column in table.columns
        if column.benchmark == "seed"
    }
    assert variants == {1: "all", 11: "all", **dict.fromkeys((10, 12, 13, 14, 16, 17), "image")}


@pytest.mark.parametrize(("table", "row"), ROWS, ids=lambda x: name_of(x) if isinstance(x, Row) else str(x.number))
def test_averages(table: PaperTable, row: Row):
    """Every printed average is that of the raw scores, or known not to be; then both are as paper.md has them."""
    average = table.average(table.paper_ratios(row))
    if row.average is None or average is None:
        assert row.average is None or table.number == 18  # which has Table 13's averages without its scores
    elif AVERAGE in (row.misprints or {}):
        assert f"{average:.1f}" == row.misprints[AVERAGE] != row.average
    else:
        assert average == pytest.approx(float(row.average), abs=ROUNDING)


def test_misprinted_averages():
    """Those of paper.md, sections 5 and 9."""
    found = {
        (table.number, row.label, row.tokens): (row.average, row.misprints[AVERAGE])
        for table, row in ROWS
        if AVERAGE in (row.misprints or {})
    }
    assert found == {
        (1, "FastV", 128): ("83.5", "84.4"),
        (12, "VisionZip", 160): ("91.5", "90.4"),
        (13, "VisionZip", 640): ("97.5", "97.7"),
        (13, "Vanilla 7B", 2880): ("97.2", "97.3"),
        (15, "VisionZip‡, LLaVA-NeXT data", 640): ("99.3", "99.8"),
        (15, "VisionZip‡, LLaVA-1.5 data", 320): ("97.6", "97.9"),
        (15, "VisionZip‡, LLaVA-NeXT data", 320): ("97.3", "97.6"),
        (15, "VisionZip‡, LLaVA-1.5 data", 160): ("95.2", "95.5"),
        (15, "VisionZip‡, LLaVA-NeXT data", 160): ("95.7", "95.9"),
    }


@pytest.mark.parametrize(
    ("table", "row"),
    [(table, row) for table, row in ROWS if row.percent],
    ids=lambda x: name_of(x) if isinstance(x, Row) else str(x.number),
)
def test_percentages(table: PaperTable, row: Row):
    """Every printed percentage is that of the raw scores, or known not to be."""
    for column, ratio, printed in zip(table.columns, table.paper_ratios(row), row.percent, strict=True):
        if column.name in (row.misprints or {}):
            assert f"{ratio:.1f}" == row.misprints[column.name] != printed
        elif printed is not None:
            assert ratio == pytest.approx(float(printed), abs=0.0501), column.name


def test_table_1_has_all_its_percentages():
    assert {len(row.percent) for row in PAPER[1].rows[1:]} == {11}
    assert not [printed for row in PAPER[1].rows[1:] for printed in row.percent if printed is None]


def test_misprinted_percentages():
    found = {
        (table.number, row.label, row.tokens, name, row.percent[[c.name for c in table.columns].index(name)])
        for table, row in ROWS
        for name in row.misprints or {}
        if name != AVERAGE
    }
    assert found == {
        (1, "FastV", 192, "MMVet", "89.7"),
        (1, "FastV", 128, "MMVet", "90.9"),
        (1, "SparseVLM", 64, "MMVet", "74.5"),
        (1, "SparseVLM", 64, "SQA", "89.4"),
        (1, "VisionZip", 128, "LLaVA-B", "97.6"),
        (13, "VisionZip", 640, "SQA", "96.7"),
        (13, "VisionZip", 640, "VQAv2", "96.9"),
        (13, "Vanilla 7B", 2880, "MMB", "96.3"),
        (14, "VisionZip", 64, "POPE", "81.4"),
    }


def test_tables_agree():
    """The same row in two tables: Table 12 has all of Table 2, and 16 and 17 repeat rows of 13 and 12."""

    def by_column(number: int, label: str, tokens: int) -> dict[str, str | None]:
        table = PAPER[number]
        values = row_of(table, label, tokens).values
        return {c.name: value for c, value in zip(table.columns, values, strict=True) if c.benchmark}

    for label in ("VisionZip", "VisionZip‡"):
        for tokens in (640, 320, 160):
            assert by_column(2, label, tokens).items() <= by_column(12, label, tokens).items()
    for tokens in (640, 320, 160):
        tuned = by_column(15, "VisionZip‡, LLaVA-1.5 data", tokens)
        assert tuned == by_column(2, "VisionZip‡", tokens)
    assert by_column(16, "VisionZip", 320) == by_column(13, "VisionZip", 320)
    assert by_column(16, "Vanilla 7B", 2880) == by_column(13, "Vanilla 7B", 2880) == by_column(12, "Vanilla", 2880)
    assert by_column(17, "VisionZip, inference only", 640) == by_column(12, "VisionZip", 640)
    assert by_column(7, "13B†", 640).items() <= by_column(13, "VisionZip", 640).items()


def test_a_file_that_contradicts_itself(tmp_path: Path):
    whole = json.loads((ROOT / "eval/reports/paper.json").read_text(encoding="utf-8"))

    def broken(change: Any) -> Path:
        content = json.loads(json.dumps(whole))
        change(content["tables"][0])
        path = tmp_path / "paper.json"
        path.write_text(json.dumps(content))
        return path

    for change, message in [
        (lambda table: table["rows"][2]["values"].pop(), "SparseVLM at 192: 10 scores"),
        (lambda table: table["rows"][1]["values"].__setitem__(0, "52,7%"), "'52,7%' is no number"),
        (lambda table: table.update(source="P+Q"), "has no 'Q'; it has P, X"),
        (lambda table: table.update(not_in_average=["MM-Vet"]), "no column 'MM-Vet'"),
        (lambda table: table["rows"][3].update(misprints={"POPS": "1"}), "POPS cannot be misprinted"),
        (lambda table: table["rows"].pop(0), "no vanilla row"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            load_paper(broken(change))

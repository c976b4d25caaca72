"""The paper's tables beside our results, in markdown and LaTeX."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.reports.paper import paper_table
from eval.reports.paper_results import load_results
from eval.reports.paper_tables import load_paper

PAPER = load_paper()


def write(path: Path, benchmark: str, *rows: tuple, model: str = "llava-v1.5-7b", **more: Any) -> None:
    """A result file; rows are method, tokens, score and, if need be, details."""
    split = {64: (54, 10), 128: (108, 20), 192: (162, 30), 32: (27, 5), 17: (14, 3)}
    entries = []
    for method, tokens, score, *details in rows:
        dominant, contextual = split.get(tokens, (None, None)) if method == "visionzip" else (None, None)
        entry = {"method": method, "tokens": tokens, "dominant": dominant, "contextual": contextual, "score": score}
        entries.append(entry | {"details": details[0] if details else {}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, "model": model, "rows": entries, **more}))


def cells(text: str) -> dict[tuple[str, str, str], list[str]]:
    """The lines of a markdown table: tokens, method and kind to its cells."""
    found, row = {}, ("", "")
    for line in text.splitlines():
        if re.match(r"\| (\d+)? ?\|", line) or line.startswith("|  |"):
            tokens, label, kind, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            row = (tokens, label) if label else row
            found[(*row, kind)] = rest
    return found


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """GQA and POPE at 64 tokens, MME's vanilla alone, a tuned model; SEED by hub and by folder."""
    folder = tmp_path / "results"
    write(folder / "gqa" / "results.json", "gqa", ("vanilla", None, 62.0), ("visionzip", 64, 55.8))
    write(folder / "pope.json", "pope", ("vanilla", None, 86.0), ("visionzip", 64, 76.97), ("random", 64, 70.0))
    write(folder / "mme.json", "mme", ("vanilla", None, 1861.97), model="liuhaotian/llava-v1.5-7b")
    write(folder / "tuned.json", "gqa", ("visionzip", 64, 57.04), tuned=True)
    write(folder / "seed.json", "seed", ("vanilla", None, 58.5, {"image": 66.1, "video": 37.0, "all": 58.5}))
    (folder / "other.json").write_text("[1, 2]")
    return folder


EMPTY = "–"  # noqa: RUF001


def test_table_1_beside_ours(results: Path):
    found = cells(paper_table(1, results, "markdown"))
    # GQA MMB MME POPE SQA VQAv2 TextVQA MMMU SEED MMVet LLaVA-B average
    assert found["576", "Vanilla", "paper"] == [
        *("61.9", "64.7", "1862", "85.9", "69.5", "78.5", "58.2", "36.3", "58.6", "31.1", "66.8", "100.0")
    ]
    assert found["576", "Vanilla", "ours"] == ["62.0", EMPTY, "1862.0", "86.0", *[EMPTY] * 4, "58.5", *[EMPTY] * 3]
    assert found["576", "Vanilla", "difference"] == ["+0.1", EMPTY, "+0.0", "+0.1", *[EMPTY] * 4, "-0.1", *[EMPTY] * 3]
    assert ("576", "Vanilla", "paper %") not in found and ("576", "Vanilla", "ours %") not in found

    assert found["64", "VisionZip", "paper"][:4] == ["55.1", "60.1", "1690", "77.0"]
    assert found["64", "VisionZip", "paper"][-1] == "94.0"
    assert found["64", "VisionZip", "paper %"][:4] == ["89.0", "92.9", "90.8", "89.6"]
    assert found["64", "VisionZip", "ours"] == ["55.8", EMPTY, EMPTY, "77.0", *[EMPTY] * 8]
    assert found["64", "VisionZip", "ours %"] == ["90.0", EMPTY, EMPTY, "89.5", *[EMPTY] * 7, ""]
    assert found["64", "VisionZip", "difference"] == ["+0.7", EMPTY, EMPTY, "+0.0", *[EMPTY] * 8]
    assert found["64", "VisionZip‡", "ours"] == ["57.0", *[EMPTY] * 11]
    assert found["64", "VisionZip‡", "ours %"][0] == "92.0"  # of the untuned vanilla
    assert found["192", "VisionZip", "ours"] == [EMPTY] * 12 and ("192", "VisionZip", "ours %") not in found
    assert found["64", "FastV", "ours"] == [EMPTY] * 12


def test_printed_stands_beside_what_the_scores_give():
    found = cells(paper_table(1, None, "markdown"))
    assert found["128", "FastV", "paper"][-1] == "84.4 (printed 83.5)"
    assert found["128", "FastV", "paper %"][9] == "90.4 (printed 90.9)"
    assert found["64", "VisionZip", "paper"][-1] == "94.0"
    assert found["576", "Vanilla", "ours"] == [EMPTY] * 12
    assert cells(paper_table(12, None, "markdown"))["160", "VisionZip", "paper"][-1] == "90.4 (printed 91.5)"


def test_an_average_of_ours_needs_every_column_that_counts(tmp_path: Path):
    """Table 10 does without MM-Vet and LLaVA-Bench, and counts SEED's images."""
    for column in PAPER[10].columns:
        if column.benchmark in ("mmvet", "llavabench"):
            continue
        details = [{"image": value, "video": 1.0, "all": 2.0} for value in (80.0, 60.0)]
        rows = [("vanilla", None, 80.0, details[0]), ("visionzip", 128, 60.0, details[1])]
        write(tmp_path / f"{column.benchmark}.json", column.benchmark, *rows, model="llava-v1.5-13b")
    found = cells(paper_table(10, tmp_path, "markdown"))
    assert found["128", "VisionZip", "ours"] == [*["60.0"] * 9, EMPTY, EMPTY, "75.0"]
    assert found["128", "VisionZip", "ours %"] == [*["75.0"] * 9, EMPTY, EMPTY, ""]
    assert found["128", "VisionZip", "difference"][-1] == "-22.0"  # of 97.0
    (tmp_path / "gqa.json").unlink()
    assert cells(paper_table(10, tmp_path, "markdown"))["128", "VisionZip", "ours"][-1] == EMPTY


def test_seed_of_the_hub_is_not_that_of_all_questions(tmp_path: Path):
    write(tmp_path / "seed.json", "seed", ("vanilla", None, 66.1, {"image": 66.1, "all": 66.1}))
    assert cells(paper_table(1, tmp_path, "markdown"))["576", "Vanilla", "ours"][8] == EMPTY


def test_tokens_of_tiles_and_frames(tmp_path: Path):
    """32 of each of five tiles are the paper's 160, 17 of each of eight frames its 136."""
    write(tmp_path / "1.json", "gqa", ("vanilla", None, 64.0), ("visionzip", 32, 56.0), model="llava-v1.6-vicuna-7b")
    write(tmp_path / "2.json", "tgif", ("visionzip", 17, 42.0), ("fastv", 17, 1.0), model="LanguageBind/Video-LLaVA-7B")
    write(tmp_path / "3.json", "gqa", ("vanilla", None, 65.0), model="llava-v1.6-vicuna-13b")
    found = cells(paper_table(12, tmp_path, "markdown"))
    assert found["160", "VisionZip", "ours"][0] == "56.0" and found["160", "VisionZip", "ours %"][0] == "87.5"
    assert found["640", "VisionZip", "ours"][0] == EMPTY
    found = cells(paper_table(3, tmp_path, "markdown"))
    assert found["136", "VisionZip", "ours"][0] == "42.0" and found["135", "FastV", "ours"][0] == EMPTY
    found = cells(paper_table(13, tmp_path, "markdown"))  # both models
    assert found["2880", "Vanilla 7B", "ours %"][0] == "98.5" and found["2880", "Vanilla 13B", "ours"][0] == "65.0"


def test_other_models_do_not_stand_for_trained_and_quantised_ones(tmp_path: Path):
    write(tmp_path / "1.json", "gqa", ("vanilla", None, 61.9), ("visionzip", 64, 55.1))
    write(tmp_path / "2.json", "sqa", ("vanilla", None, 73.5), ("visionzip", 64, 70.3), model="llava-v1.6-vicuna-13b")
    assert cells(paper_table(11, tmp_path, "markdown"))["64", "VisionZip-Train", "ours"][0] == EMPTY
    assert cells(paper_table(11, tmp_path, "markdown"))["576", "Vanilla", "ours"][0] == "61.9"
    assert cells(paper_table(6, tmp_path, "markdown"))["320", "VisionZip-4bit", "ours"][1] == EMPTY
    assert cells(paper_table(16, tmp_path, "markdown"))["320", "VisionZip", "ours"][5] == "70.3"


@pytest.mark.parametrize("number", [4, 7, 18])
def test_efficiency_is_the_papers_alone(number: int, results: Path):
    text = paper_table(number, results, "markdown")
    heading = {4: "prefill (ms)", 7: "time (s) | TextVQA", 18: "prefill (ms) | total time (s) | Avg. %"}[number]
    assert heading in text
    for (_, _, kind), line in cells(text).items():
        assert kind in ("paper", "paper %", "ours") and (kind != "ours" or set(line) == {EMPTY})


def test_left_out_results_are_told(tmp_path: Path):
    write(tmp_path / "a" / "results.json", "gqa", ("vanilla", None, 10.0), limited=True)
    write(tmp_path / "b.json", "mmvet", ("vanilla", None, 20.0), judge="exact")
    write(tmp_path / "c.json", "gqa", ("visionzip", 64, 30.0), ("vanilla", None, None))
    path = tmp_path / "c.json"
    path.write_text(path.read_text().replace('"dominant": 54, "contextual": 10', '"dominant": 48, "contextual": 16'))
    write(tmp_path / "d.json", "tgif", ("vanilla", None, 40.0), setting={"frames": 120})
    assert load_results(tmp_path)[0] == []
    text = paper_table(1, tmp_path, "markdown")
    assert "- Left out: a/results.json (only a part of the questions)." in text
    assert "- Left out: b.json (judged by the offline proxy)." in text
    assert "- Left out: d.json (120 frames of each video, not 8)." in text
    assert "- Left out: c.json, visionzip 48+16 (not the paper's split)." in text
    assert cells(text)["64", "VisionZip", "ours"] == [EMPTY] * 12


def test_results_that_contradict_each_other(results: Path):
    write(results / "again.json", "gqa", ("vanilla", None, 62.0))  # the same number is no contradiction
    paper_table(1, results, "markdown")
    write(results / "again.json", "gqa", ("vanilla", None, 61.0))
    with pytest.raises(ValueError, match=r"two results for GQA, Vanilla at 576 tokens: 61 in .*again\.json and 62 in"):
        paper_table(1, results, "markdown")


def test_bad_requests(tmp_path: Path):
    with pytest.raises(ValueError, match="--paper 5: there are tables 1, 2, 3, 4, 6, 7, 10,"):
        paper_table(5, None, "markdown")
    with pytest.raises(ValueError, match="--format html"):
        paper_table(1, None, "html")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing"):
        paper_table(1, tmp_path / "nothing", "markdown")
    (tmp_path / "results.json").write_text('{"benchmark": ')
    with pytest.raises(ValueError, match=r"results\.json is no json"):
        paper_table(1, tmp_path, "markdown")


def test_latex(results: Path):
    text = paper_table(1, results, "latex")
    lines = text.splitlines()
    assert lines[0] == r"\begin{table}[t]" and lines[-1] == r"\end{table}"
    assert r"\begin{tabular}{rll" + "r" * 12 + "}" in lines
    assert lines.count(r"\toprule") == lines.count(r"\bottomrule") == 1 and lines.count(r"\midrule") == 13
    names = [column.name for column in PAPER[1].columns]
    assert r"tokens & method &  & " + " & ".join(names) + r" & Avg. \% \\" in lines
    assert r"64 & VisionZip$\ddagger$ & paper & 57.0 & 61.5 & 1756" in text
    assert r" &  & ours & 57.0 & -- & -- & -- & -- & -- & -- & -- & -- & -- & -- & -- \\" in lines
    assert r" &  & difference & $+0.7$ & -- & -- & $+0.0$ & --" in text
    assert r" &  & paper \% & 89.0" in text and r"84.4 (printed 83.5) \\" in text
    assert r"$\ddagger$: projector tuned" in text


@pytest.mark.parametrize("number", PAPER)
def test_every_table_in_latex_and_markdown(number: int):
    """Lines of equal width, and nothing in LaTeX that would not compile with ``pdflatex`` and ``booktabs``."""
    latex, markdown = (paper_table(number, None, style) for style in ("latex", "markdown"))
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", latex)[1])
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {columns - 1}
    assert latex.isascii() and not re.search(r"(?<!\\)[%#_]", latex)
    assert latex.count("{") == latex.count("}")
    assert {line.count("|") for line in markdown.splitlines() if line.startswith("|")} == {columns + 1}
    assert sum(line.startswith("|") for line in markdown.splitlines()) == len(body) + 1

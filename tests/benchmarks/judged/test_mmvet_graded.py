"""MM-Vet: files of grades that the official evaluator wrote, and its aggregation of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks.mmvet import BENCHMARK, graded  # noqa: F401 - BENCHMARK is for the fixtures


def write_grades(path: Path, scores: dict[str, list[float]]) -> Path:
    """As mm-vet_evaluator.py writes them."""
    content = {
        name: {"model": ["gpt-4-0613"] * len(own), "content": [str(score) for score in own], "score": own}
        for name, own in scores.items()
    }
    path.write_text(json.dumps(content, indent=4))
    return path


def test_several_runs(folder: Path, tmp_path: Path):
    """By hand: totals 100 * (0.5 + 1 + 0.2 + 0.3) / 4 = 50 and 100 * (0.5 + 1 + 0.4 + 0.5) / 4 = 60."""
    scores = {"v1_0": [0.5, 0.5], "v1_1": [1.0, 1], "v1_2": [0.2, 0.4], "v1_3": [0.3, 0.5]}
    result = graded(write_grades(tmp_path / "grades.json", scores), folder)
    assert result.score == pytest.approx(55.0) and "gpt-4-0613" in result.metric
    assert result.details["runs"] == pytest.approx([50.0, 60.0]) and result.details["std"] == pytest.approx(5.0)
    assert result.parts == pytest.approx({"rec": 70.0, "ocr": 40.0, "know": 40.0, "gen": 40.0, "math": 40.0})
    assert result.details["capability_sets"] == pytest.approx({"ocr_math": 40.0, "rec": 100.0, "rec_know_gen": 40.0})
    assert result.details["printed"] == {
        **{"rec": 70.0, "ocr": 40.0, "know": 40.0, "gen": 40.0, "math": 40.0},
        **{"total": 55.0, "std": 5.0, "runs": [50.0, 60.0]},
    }


def test_a_whole_file_without_the_items(tmp_path: Path):
    """Only the total then. 68.1 of 218 is the published 31.24 (LLaVA-1.5-7B, one run of the judge)."""
    scores = {f"v1_{number}": [1.0 if number < 68 else 0.1 if number == 68 else 0.0] for number in range(218)}
    result = graded(write_grades(tmp_path / "grades.json", scores), None)
    assert round(result.score, 2) == 31.24 and result.details["printed"]["total"] == 31.2
    assert result.details["items"] == 218 and result.details["missing"] == 0 and result.parts == {}
    assert graded(tmp_path / "grades.json", tmp_path).score == result.score


def test_the_official_sum_to_the_last_bit(tmp_path: Path):
    """Grades are added one by one in the file's order, each run for itself; then divided, then times 100."""
    draws = np.random.default_rng(0).integers(0, 11, (218, 3)) / 10
    scores = {f"v1_{number}": own for number, own in enumerate(draws.tolist())}
    totals = [0.0, 0.0, 0.0]
    for own in scores.values():
        for run in range(3):
            totals[run] += own[run]
    result = graded(write_grades(tmp_path / "grades.json", scores), None)
    assert result.details["runs"] == [total / 218 * 100 for total in totals]
    assert result.score == float(np.mean(result.details["runs"]))


def test_graded_replies_without_a_grade(folder: Path, tmp_path: Path):
    """The official tool writes 0 for them: that score is marked, and of nothing else there is none."""
    path = write_grades(tmp_path / "grades.json", {f"v1_{number}": [0.0 if number else 1.0] for number in range(4)})
    content = json.loads(path.read_text())
    content["v1_1"]["content"] = ["Correct"]
    path.write_text(json.dumps(content))
    result = graded(path, folder)
    assert result.score == 25.0 and result.details["unjudged"] == 1
    assert "INCOMPLETE: no readable reply of the judge about 1 of 4 answers" in result.metric
    path.write_text(json.dumps({name: {**row, "content": ["busy"]} for name, row in content.items()}))
    with pytest.raises(ValueError, match=r"none of the replies in .*grades\.json has a grade"):
        graded(path, folder)


def test_unfinished_grading(folder: Path, tmp_path: Path):
    """Items that are not graded count as 0 and are reported; a run that not all items have does not count."""
    result = graded(write_grades(tmp_path / "grades.json", {"v1_0": [1.0, 0.0], "v1_1": [0.6]}), folder)
    assert result.score == pytest.approx(40.0) and result.details["missing"] == 2
    assert len(result.details["runs"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no graded items"),
        ("{}", "no graded items"),
        ('{"v1_0": 0.5}', "v1_0 in .* has no grades"),
        ('{"v1_0": {"model": [], "content": [], "score": []}}', "v1_0 in .* has no grades"),
        ('{"v1_0": {"score": ["0.5"]}}', "the grade '0.5'"),
        ('{"v1_0": {"score": [5]}}', "the grade 5"),
        ('{"v2_0": {"score": [0.5]}}', "grades of v2_0, which .*mm-vet.json does not have"),
        ('{"v1_0": {"sc', "is no json"),
    ],
)
def test_bad_graded_files(folder: Path, tmp_path: Path, content: str, message: str):
    (tmp_path / "grades.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        graded(tmp_path / "grades.json", folder)

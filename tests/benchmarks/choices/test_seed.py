"""SEED-Bench: images, videos and all; ids that are numbers or not; both sources of data."""

from __future__ import annotations

import json
from pathlib import Path

import data_seed as data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.benchmarks.seed import BENCHMARK, Gold, score
from eval.reading.tables import Tables
from eval.records import Answer


def test_questions_of_the_folder(folder: Path):
    asked = BENCHMARK.from_folder(folder)
    assert [(question.id, question.category) for question in asked] == [
        (101669, "Instances Counting"),
        (23000, "Scene Understanding"),
        ("v0", "Action Recognition"),
    ]
    assert asked[0].text == (
        "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert asked[0].visuals[0].path == folder / "SEED-Bench-image" / "1454426_2591111986"
    assert asked[2].visuals[0].path == folder / "SEED-Bench-video-image" / "10_v0.png"
    assert asked[0].visuals[0].open()[0].size == (18, 22)


def test_questions_of_the_tables_are_about_images(folder: Path, tables: Tables):
    asked = BENCHMARK.from_tables(tables)
    assert [question.text for question in asked] == [each.text for each in BENCHMARK.from_folder(folder)[:2]]
    assert [question.id for question in asked] == ["101669", "23000"]
    assert [question.visuals[0].open()[0].getpixel((0, 0)) for question in asked] == [(0, 120, 30), (80, 120, 30)]
    assert BENCHMARK.truth_from_tables(tables) == {
        "101669": Gold("A", "image", "type 5"),
        "23000": Gold("C", "image", "type 1"),
    }


@pytest.mark.parametrize("content", [b"no image", None])
def test_a_broken_image_and_parquet_without_the_hubs_types(content, tables: Tables, tmp_path: Path):
    """As plain pyarrow writes it; the broken one is named when it is opened."""
    table = pq.read_table(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet").to_pylist()
    table[1]["image"] = [{"bytes": content, "path": None}]
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "plain" / "test-00000-of-00001.parquet")
    first, second = BENCHMARK.from_tables(Tables(BENCHMARK.tables, tmp_path / "plain"))
    assert first.visuals[0].open()[0].getpixel((0, 0)) == (0, 120, 30)
    with pytest.raises(ValueError, match="SEED-Bench test row 1 image"):
        second.visuals[0].open()


TRUTH = {
    "1": Gold("A", "image", "Scene Understanding"),
    "2": Gold("B", "image", "Instances Counting"),
    "v0": Gold("C", "video", "Action Recognition"),
    "v1": Gold("D", "video", "Action Recognition"),
}


def test_score():
    """Only the very letter counts; a missing answer is wrong."""
    result = score([Answer("2", "B."), Answer("v1", "D"), Answer(1, "A"), Answer(8, "A")], TRUTH)
    assert result.score == 50
    assert result.parts == {"image": 50, "video": 50, "all": 50}
    assert result.points is None  # of another set than the questions
    assert result.details["types"] == {"Scene Understanding": 100, "Instances Counting": 0, "Action Recognition": 50}
    counts = {"missing": 1, "unexpected": 1, "repeated": 0, "correct": 2, "not_letters": 1, "image_questions": 2}
    assert counts.items() <= result.details.items()


def test_without_videos():
    result = score([Answer(1, "A")], {name: gold for name, gold in TRUTH.items() if gold.kind == "image"})
    assert result.parts == {"image": 50, "all": 50}


def test_the_published_shape():
    """14,233 images and 5,009 videos: 9,417 and 1,858 right are 66.16 and 37.09, and 58.6 together."""
    truth = {str(number): Gold("A", "image", "one") for number in range(14233)}
    truth |= {f"v{number}": Gold("B", "video", "two") for number in range(5009)}
    answers = [Answer(number, "A" if number < 9417 else "B") for number in range(14233)]
    answers += [Answer(f"v{number}", "B" if number < 1858 else "A") for number in range(5009)]
    parts = score(answers, truth).parts
    assert {name: f"{part:.2f}" for name, part in parts.items()} == {"image": "66.16", "video": "37.09", "all": "58.60"}


def test_truth_needs_one_file_only(tmp_path: Path):
    data.write_truth(tmp_path)
    truth = BENCHMARK.truth_from_folder(tmp_path)
    assert truth == {
        "101669": Gold("A", "image", "Instances Counting"),
        "23000": Gold("C", "image", "Scene Understanding"),
        "v0": Gold("D", "video", "Action Recognition"),
    }


@pytest.mark.parametrize("texts", [["A", "C", "D"], ["A", "C.", "B"], ["x", "C", ""]])
def test_expected_agrees(texts, folder: Path, tables: Tables):
    for asked, truth in (
        (BENCHMARK.from_folder(folder), BENCHMARK.truth_from_folder(folder)),
        (BENCHMARK.from_tables(tables), BENCHMARK.truth_from_tables(tables)),
    ):
        said = texts[: len(asked)]
        answers = [Answer(question.id, text) for question, text in zip(asked, said, strict=True)]
        assert score(answers, truth).score == pytest.approx(data.expected(said))


def test_bad_data(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="llava-seed-bench"):
        BENCHMARK.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="SEED-Bench"):
        BENCHMARK.truth_from_folder(tmp_path)
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": []}))
    with pytest.raises(ValueError, match="has no 'question_type'"):
        BENCHMARK.truth_from_folder(tmp_path)
    line = json.dumps({"image": "a", "text": "b", "category": "c", "question_id": 1})
    (tmp_path / "llava-seed-bench.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="more than once"):
        BENCHMARK.from_folder(tmp_path)

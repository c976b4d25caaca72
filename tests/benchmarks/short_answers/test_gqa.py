"""GQA: questions, right answers and score, from LLaVA's folder and from the hub's tables."""

from __future__ import annotations

import json
from pathlib import Path

import data_gqa
import pytest

from eval.benchmarks.gqa import BENCHMARK, Gold
from eval.reading.tables import Tables
from eval.records import Answer

IDS = [row[0] for row in data_gqa.QUESTIONS]
ANSWERS = ["No.", "man", "large", "No, there are none", "Hot Dog.."]  # right, wrong, right, wrong, right


def answers(texts: list[str] = ANSWERS) -> list[Answer]:
    return [Answer(name, text) for name, text in zip(IDS, texts, strict=True)]


def test_folder_and_hub_ask_the_same(folder: Path, tables: Tables):
    of_folder, of_tables = BENCHMARK.from_folder(folder), BENCHMARK.from_tables(tables)
    assert [(q.id, q.text) for q in of_folder] == [(q.id, q.text) for q in of_tables]
    first = of_folder[0]
    assert first.id == "201307251"
    assert first.text == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert first.visuals[0].path == folder / "data" / "images" / "n161313.jpg"


def test_questions_get_their_image(folder: Path, tables: Tables):
    for questions in (BENCHMARK.from_folder(folder), BENCHMARK.from_tables(tables)):
        for question, row in zip(questions, data_gqa.QUESTIONS, strict=True):
            (image,) = question.visuals[0].open()
            assert image.getpixel((5, 5)) == pytest.approx(data_gqa.color_of(row[1]), abs=3)
        keys = [question.visuals[0].key for question in questions]
        assert keys[0] == keys[3] != keys[1] == keys[4]  # they share its tokens


def test_the_truth_is_the_balanced_set(folder: Path, tables: Tables):
    truth = BENCHMARK.truth_from_folder(folder)
    assert truth == BENCHMARK.truth_from_tables(tables)
    assert list(truth) == IDS
    assert truth["20602949"] == Gold("hot dog", {"structural": "query", "semantic": "rel"})


def test_score(folder: Path):
    score = BENCHMARK.score(answers(), BENCHMARK.truth_from_folder(folder), None)
    assert score.score == pytest.approx(60) == data_gqa.expected(ANSWERS)
    assert score.parts == pytest.approx({"binary": 200 / 3, "open": 50})
    assert score.details["structural"]["query"] == {"accuracy": 50, "questions": 2}
    assert score.details["semantic"]["rel"] == {"accuracy": 50, "questions": 2}
    assert score.details["unexpected"] == score.details["missing"] == 0
    assert score.points == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "right"), [("no", 1), ("NO...", 1), ("no. ", 0), ("no!", 0), ("the no", 0), ("", 0), ("no\n", 0)]
)
def test_only_full_stops_at_the_end_and_capitals_are_forgiven(text: str, right: int):
    assert BENCHMARK.score([Answer("1", text)], {"1": Gold("no")}, None).score == 100 * right


def test_missing_answers_are_wrong_and_reported(folder: Path):
    given = [*answers()[2:], Answer("999", "no"), Answer("no such", "no")]
    score = BENCHMARK.score(given, BENCHMARK.truth_from_folder(folder), None)
    assert score.score == pytest.approx(40)
    assert (score.details["missing"], score.details["unexpected"]) == (2, 2)
    assert score.points is None


def test_the_order_of_the_answers_does_not_matter(folder: Path):
    score = BENCHMARK.score(answers()[::-1], BENCHMARK.truth_from_folder(folder), None)
    assert score.score == pytest.approx(60)
    assert score.points == [1, 0, 1, 0, 1][::-1]


def test_the_official_file_may_lie_as_its_zip_unpacks(folder: Path):
    truth = BENCHMARK.truth_from_folder(folder)
    (folder / "data" / "questions1.2").mkdir()
    name = "testdev_balanced_questions.json"
    (folder / "data" / name).rename(folder / "data" / "questions1.2" / name)
    assert BENCHMARK.truth_from_folder(folder) == truth
    assert BENCHMARK.truth_from_folder(folder / "data" / "questions1.2") == truth


def test_scoring_needs_the_official_file_alone(folder: Path):
    (folder / "llava_gqa_testdev_balanced.jsonl").unlink()
    BENCHMARK.score(answers(), BENCHMARK.truth_from_folder(folder), None)
    (folder / "data" / "testdev_balanced_questions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"testdev_balanced_questions\.json.*prepare"):
        BENCHMARK.truth_from_folder(folder)


def test_bad_data_is_named(folder: Path, tmp_path: Path):
    file = folder / "llava_gqa_testdev_balanced.jsonl"
    lines = file.read_text()
    file.write_text(lines + lines.splitlines()[0])
    with pytest.raises(ValueError, match=r"ids more than once.*201307251"):
        BENCHMARK.from_folder(folder)
    file.write_text('{"question_id": "1", "text": "Is it?"}\n')
    with pytest.raises(ValueError, match="no 'image'; it has question_id, text"):
        BENCHMARK.from_folder(folder)
    official = folder / "data" / "testdev_balanced_questions.json"
    official.write_text(json.dumps({"1": {"isBalanced": True}}))
    with pytest.raises(ValueError, match=r"question 1 of .* has no 'answer'"):
        BENCHMARK.truth_from_folder(folder)


def test_an_image_that_the_hub_has_not(tables: Tables, tmp_path: Path):
    file = tmp_path / "hub" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    features = data_gqa.datasets.Features({"id": data_gqa.datasets.Value("string"), "image": data_gqa.datasets.Image()})
    data_gqa.write_parquet(file, [{"id": "n1", "image": {"bytes": data_gqa.jpeg((0, 0, 0)), "path": "a"}}], features)
    with pytest.raises(ValueError, match="has no image 'n161313'"):
        BENCHMARK.from_tables(tables)

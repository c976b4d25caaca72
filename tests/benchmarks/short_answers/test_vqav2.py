"""VQAv2: test-dev is submitted to the server, the validation set is scored here."""

from __future__ import annotations

import json
from pathlib import Path

import data_vqav2
import pytest

from eval.benchmarks.vqav2 import BENCHMARK
from eval.reading.tables import Tables
from eval.records import Answer, ScoredByServerError

IDS = [row[0] for row in data_vqav2.VALIDATION]
ANSWERS = ["At the table", "Yes", "two", "Cat"]  # "at table": 0.9; 1; "2", which five people gave: 1; "cat": 0


def answers() -> list[Answer]:
    return [Answer(name, text) for name, text in zip(IDS, ANSWERS, strict=True)]


def test_the_folder_asks_test_dev(folder: Path):
    questions = BENCHMARK.from_folder(folder)
    assert [question.id for question in questions] == [262144000, 262144001, 262144005]
    assert questions[0].text == (
        "Is the ball flying towards the batter?\nAnswer the question using a single word or phrase."
    )
    assert questions[2].visuals[0].path == folder / "test2015" / "COCO_test2015_000000262145.jpg"
    assert questions[2].visuals[0].open()[0].size == (40, 30)


def test_the_hub_asks_validation(tables: Tables):
    questions = BENCHMARK.from_tables(tables)
    assert [question.id for question in questions] == IDS
    assert questions[0].text == "Where is he looking?\nAnswer the question using a single word or phrase."
    keys = [question.visuals[0].key for question in questions]
    assert keys[0] == keys[1] != keys[2] == keys[3]  # of one image
    for question, (_, image, *_) in zip(questions, data_vqav2.VALIDATION, strict=True):
        pixel = question.visuals[0].open()[0].getpixel((5, 5))
        assert pixel == pytest.approx(data_vqav2.color_of(str(image)), abs=3)


def test_validation_is_scored_as_the_server_would(tables: Tables):
    score = BENCHMARK.score(answers(), BENCHMARK.truth_from_tables(tables), None)
    assert score.score == pytest.approx(100 * (0.9 + 1 + 1 + 0) / 4)
    assert score.score == pytest.approx(data_vqav2.expected(["at table", "yes", "two", "Cat"]))
    assert score.parts == pytest.approx({"number": 100, "other": 45, "yes/no": 100})
    assert score.points == pytest.approx([0.9, 1, 1, 0])
    # As they are, "Yes" is not "yes" but "Cat" is "Cat"; lmms-eval takes both.
    assert score.details["other_variants"] == pytest.approx(
        {"official tool, answers as they are": 100 * (0.9 + 0 + 1 + 1) / 4, "lmms-eval": 100 * (0.9 + 1 + 1 + 1) / 4}
    )


def test_missing_answers_count_as_empty_ones(tables: Tables):
    score = BENCHMARK.score(answers()[:1], BENCHMARK.truth_from_tables(tables), None)
    assert score.score == pytest.approx(100 * 0.9 / 4)
    assert score.details["missing"] == 3


def test_annotations_beside_the_questions_score_validation_answers(folder: Path, tables: Tables):
    data_vqav2.write_annotations(folder)
    truth = BENCHMARK.truth_from_folder(folder)
    of_tables = BENCHMARK.score(answers(), BENCHMARK.truth_from_tables(tables), None)
    assert BENCHMARK.score(answers(), truth, None) == of_tables
    with pytest.raises(ScoredByServerError):  # with them, too, test-dev has no right answers
        BENCHMARK.score([Answer(262144000, "no")], truth, None)


def test_annotations_alone_are_enough_to_score(tmp_path: Path):
    data_vqav2.write_annotations(tmp_path)
    truth = BENCHMARK.truth_from_folder(tmp_path)
    assert BENCHMARK.score(answers(), truth, None).score == pytest.approx(72.5)
    with pytest.raises(ValueError, match="none of the 1 answers"):
        BENCHMARK.score([Answer(262144000, "no")], truth, None)


def test_the_server_scores_test_dev(folder: Path):
    with pytest.raises(ScoredByServerError, match=r"EvalAI.*vqav2_submission\.json.*challenge-page/830"):
        BENCHMARK.score([Answer(262144000, "no")], BENCHMARK.truth_from_folder(folder), None)


def test_the_submission_has_every_question_of_test2015(folder: Path, tmp_path: Path):
    given = [Answer(262144001, "The Base-ball."), Answer("262144005", "two"), Answer(262144000, "no")]
    file = BENCHMARK.submit(given, BENCHMARK.truth_from_folder(folder), tmp_path / "new")
    assert json.loads(file.read_text()) == [
        {"question_id": 262144002, "answer": ""},
        {"question_id": 262144005, "answer": "2"},
        {"question_id": 262144001, "answer": "base ball"},
        {"question_id": 262144000, "answer": "no"},
    ]
    assert json.loads(file.read_text()) == data_vqav2.expected_submission(["No", "base-ball", "2"])
    assert file.read_text().startswith('[{"question_id": 262144002, "answer": ""}, {')
    assert file == tmp_path / "new" / "vqav2_submission.json"


def test_a_results_file_of_validation(tables: Tables, tmp_path: Path):
    file = BENCHMARK.submit(answers(), BENCHMARK.truth_from_tables(tables), tmp_path)
    texts = ["at table", "yes", "2", "cat"]
    assert json.loads(file.read_text()) == [
        {"question_id": name, "answer": text} for name, text in zip(IDS, texts, strict=True)
    ]


def test_what_is_missing_is_named(folder: Path):
    (folder / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"llava_vqav2_mscoco_test2015\.jsonl"):
        BENCHMARK.truth_from_folder(folder)
    data_vqav2.write_annotations(folder)
    file = folder / "v2_mscoco_val2014_annotations.json"
    file.write_text(file.read_text().replace('"answer_id": 10}', '"answer_id": 10}, {"answer": "up"}', 1))
    with pytest.raises(ValueError, match=r"question 262148000 of .* has 11 people's answers"):
        BENCHMARK.truth_from_folder(folder)

"""VizWiz: the test set is submitted to the server, the validation set is scored here."""

from __future__ import annotations

import json
from pathlib import Path

import data_vizwiz
import pytest

from eval.benchmarks.vizwiz import BENCHMARK
from eval.reading.tables import Tables
from eval.records import Answer, ScoredByServerError
from eval.scoring.vqa_server import Truth

IDS = [f"VizWiz_val_{number:08d}" for number in range(3)]
ANSWERS = ["Unsuitable", "the Beatles", "Yes"]  # 0.6, 0.9, 0.3


def answers(ids: list[str] = IDS) -> list[Answer]:
    return [Answer(name, text) for name, text in zip(ids, ANSWERS, strict=True)]


def test_the_folder_asks_the_test_set(folder: Path):
    questions = BENCHMARK.from_folder(folder)
    assert [question.id for question in questions] == [0, 1, 2]
    assert questions[1].text == (
        "What is this? \nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    assert questions[1].visuals[0].path == folder / "test" / "VizWiz_test_00000001.jpg"
    assert questions[1].visuals[0].open()[0].size == (40, 30)


def test_the_hub_asks_validation(tables: Tables):
    questions = BENCHMARK.from_tables(tables)
    assert [question.id for question in questions] == IDS
    assert questions[0].text == (  # one capital, as in LLaVA's file
        "Ok. there is another picture, what is it?\nWhen the provided information is insufficient, respond with "
        "'Unanswerable'.\nAnswer the question using a single word or phrase."
    )
    assert questions[0].visuals[0].open()[0].size == (40, 30)


def test_validation_is_scored(tables: Tables):
    score = BENCHMARK.score(answers(), BENCHMARK.truth_from_tables(tables), None)
    assert score.score == pytest.approx(60)
    assert score.score == pytest.approx(data_vizwiz.expected(ANSWERS))
    assert score.parts == pytest.approx({"other": 90, "unanswerable": 60, "yes/no": 30})
    assert score.points == pytest.approx([0.6, 0.9, 0.3])


def test_annotations_beside_the_questions_score_validation_answers(folder: Path, tables: Tables):
    data_vizwiz.write_annotations(folder)
    truth = BENCHMARK.truth_from_folder(folder)
    of_tables = BENCHMARK.score(answers(), BENCHMARK.truth_from_tables(tables), None)
    assert BENCHMARK.score(answers(), truth, None) == of_tables
    assert BENCHMARK.score(answers([f"{name}.jpg" for name in IDS]), truth, None) == of_tables
    with pytest.raises(ScoredByServerError):
        BENCHMARK.score([Answer(0, "no")], truth, None)
    (folder / "llava_test.jsonl").unlink()
    assert BENCHMARK.score(answers(), BENCHMARK.truth_from_folder(folder), None) == of_tables


def test_the_server_scores_the_test_set(folder: Path):
    with pytest.raises(ScoredByServerError, match=r"EvalAI.*vizwiz_submission\.json"):
        BENCHMARK.score([Answer(0, "no")], BENCHMARK.truth_from_folder(folder), None)


def test_the_submission_has_every_image(folder: Path, tmp_path: Path):
    given = [Answer(2, "32 fl. oz."), Answer(0, "Unanswerable"), Answer(1, "The two cans")]
    file = BENCHMARK.submit(given, BENCHMARK.truth_from_folder(folder), tmp_path / "new")
    assert file.read_text() == (
        '[{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}, '
        '{"image": "VizWiz_test_00000001.jpg", "answer": "2 cans"}, '
        '{"image": "VizWiz_test_00000002.jpg", "answer": "32 fl oz"}]'
    )
    assert json.loads(file.read_text()) == data_vizwiz.expected_submission(
        ["unanswerable", "the two cans", "32 fl. oz."]
    )


@pytest.mark.parametrize(
    ("text", "uploaded"),
    [
        ("Half and half", "half and half"),
        ("6:00", "6:00"),
        ("08/13/2011", "08 13 2011"),
        (
            "Sesame Street: Animal Zoo (Sesame Street Beginnings)",
            "sesame street: animal zoo sesame street beginnings",
        ),
    ],
)
def test_uploads_are_those_of_llava(text: str, uploaded: str, tmp_path: Path):
    """Of the answers and the upload of LLaVA-1.5-13B in LLaVA's eval.zip."""
    truth = Truth({153: "VizWiz_test_00000153.jpg"}, {})
    file = BENCHMARK.submit([Answer(153, text)], truth, tmp_path)
    assert json.loads(file.read_text()) == [{"image": "VizWiz_test_00000153.jpg", "answer": uploaded}]


def test_the_server_wants_all(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"1 of 3 images have no answer \(the first is VizWiz_test_00000001\.jpg\)"):
        BENCHMARK.submit([Answer(0, "a"), Answer(2, "b")], BENCHMARK.truth_from_folder(folder), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_results_file_of_validation(tables: Tables, tmp_path: Path):
    file = BENCHMARK.submit(answers(), BENCHMARK.truth_from_tables(tables), tmp_path)
    texts = ["unsuitable", "beatles", "yes"]
    assert json.loads(file.read_text()) == [
        {"image": f"{name}.jpg", "answer": text} for name, text in zip(IDS, texts, strict=True)
    ]


def test_what_is_missing_is_named(folder: Path):
    (folder / "llava_test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"llava_test\.jsonl"):
        BENCHMARK.truth_from_folder(folder)

"""TextVQA: prompts with OCR tokens, the join by image and question, and the score."""

from __future__ import annotations

import json
from pathlib import Path

import data_textvqa
import pytest

from eval.benchmarks.textvqa import BENCHMARK
from eval.reading.tables import Tables
from eval.records import Answer

ANSWERS = ["Nous les gosses!", "Malt.", "10 years", "Twenty"]  # 0.3, 0.6, 0.9 (with "ten years"), 0


def answered(questions: list) -> list[Answer]:
    return [Answer(question.id, text, question.text) for question, text in zip(questions, ANSWERS, strict=True)]


def test_prompts_have_the_ocr_tokens(folder: Path, tables: Tables):
    of_folder, of_tables = BENCHMARK.from_folder(folder), BENCHMARK.from_tables(tables)
    assert [(q.id, q.text) for q in of_folder] == [(q.id, q.text) for q in of_tables]
    assert of_folder[0].text == (
        "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use, Camera\n"
        "Answer the question using a single word or phrase."
    )
    assert of_folder[3].text.split("\n")[1] == "Reference OCR token: "  # the line is there without tokens, too
    assert of_folder[0].visuals[0].path == folder / "train_images" / "003a8ae2ef43b901.jpg"


def test_questions_get_their_image(folder: Path, tables: Tables):
    for questions in (BENCHMARK.from_folder(folder), BENCHMARK.from_tables(tables)):
        for question, (name, *_) in zip(questions, data_textvqa.QUESTIONS, strict=True):
            (image,) = question.visuals[0].open()
            assert image.getpixel((5, 5)) == pytest.approx(data_textvqa.color_of(name), abs=3)
        keys = [question.visuals[0].key for question in questions]
        assert keys[1] == keys[2] != keys[0]


def test_score(folder: Path, tables: Tables):
    of_folder = BENCHMARK.score(answered(BENCHMARK.from_folder(folder)), BENCHMARK.truth_from_folder(folder), None)
    assert of_folder.score == pytest.approx(100 * (0.3 + 0.6 + 0.9 + 0) / 4)
    assert of_folder.score == pytest.approx(data_textvqa.expected(["nous les gosses", "malt", "ten years", "x"]))
    assert of_folder.points == pytest.approx([0.3, 0.6, 0.9, 0])
    nothing = dict.fromkeys(("missing", "unexpected", "repeated", "unreadable"), 0)
    assert of_folder.details == {"questions": 4, "answers": 4, **nothing}
    of_tables = BENCHMARK.score(answered(BENCHMARK.from_tables(tables)), BENCHMARK.truth_from_tables(tables), None)
    assert of_tables == of_folder


@pytest.mark.parametrize(
    "prompt",
    [
        "What IS it?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\nWhat is it?\nAnswer the question using a single word or phrase.",
        "What is it?\nAnswer the question using a single word or phrase.",
        "OCR tokens: A, B. Question: what is it? Short answer:",
    ],
)
def test_the_question_is_found_in_every_form_of_prompt(prompt: str):
    truth = {("1f", "what is it?"): ("clock",) * 10}
    assert BENCHMARK.score([Answer("1f", "clock", prompt)], truth, None).score == 100


@pytest.mark.parametrize("prompt", ["", "What is it?", "What is it?\nA\nB\nC", "OCR tokens: what is it?", "a\nb\nc"])
def test_other_prompts_are_counted_as_unexpected(prompt: str):
    truth = {("1f", "what is it?"): ("clock",) * 10}
    good = Answer("1f", "clock", "What is it?\nAnswer.")
    score = BENCHMARK.score([good, Answer("1f", "clock", prompt)], truth, None)
    assert (score.score, score.details["unexpected"], score.points) == (100, 1, None)


def test_the_mean_is_over_the_answers_that_are_there(folder: Path):
    """As in LLaVA's script."""
    given = answered(BENCHMARK.from_folder(folder))[1:3]
    score = BENCHMARK.score(given, BENCHMARK.truth_from_folder(folder), None)
    assert score.score == pytest.approx(75)
    assert score.details["missing"] == 2


def test_a_number_for_an_image_id_is_as_good_as_its_digits():
    truth = {("123", "what is it?"): ("clock",) * 10}
    assert BENCHMARK.score([Answer(123, "clock", "What is it?\nAnswer.")], truth, None).score == 100


def test_of_the_same_question_twice_the_last_counts(folder: Path):
    file = folder / "TextVQA_0.5.1_val.json"
    content = json.loads(file.read_text())
    content["data"].append({**content["data"][0], "answers": ["kodak"] * 10})
    file.write_text(json.dumps(content))
    truth = BENCHMARK.truth_from_folder(folder)
    assert len(truth) == 4
    assert truth["003a8ae2ef43b901", "what is the brand of this camera?"] == ("kodak",) * 10


def test_bad_data_is_named(folder: Path):
    file = folder / "TextVQA_0.5.1_val.json"
    content = json.loads(file.read_text())
    content["data"][0]["answers"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"'what is the brand of this camera\?' about image 003a8ae2ef43b901.* 9 people"
    ):
        BENCHMARK.truth_from_folder(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="TextVQA_0"):
        BENCHMARK.truth_from_folder(folder)

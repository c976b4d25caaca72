"""ScienceQA: which letter an answer chooses, which questions have an image, both sources of data."""

from __future__ import annotations

import json
from pathlib import Path

import data_sqa as data
import pytest

from eval.benchmarks.sqa import BENCHMARK, Problem, letter, score
from eval.reading.tables import Tables
from eval.records import Answer

SUFFIX = "\nAnswer with the option's letter from the given choices directly."


def test_questions_of_the_folder(folder: Path):
    first, second, third = BENCHMARK.from_folder(folder)
    assert first.text == (
        "Context: Select the better answer.\nLook at the slide.\nWhich material is this slide made of?\n"
        f"A. cardboard\nB. plastic{SUFFIX}"
    )
    assert first.prompt == f"<image>\n{first.text}"
    assert (second.visuals, second.prompt) == ((), second.text)
    assert third.text == f"What is the capital?\nA. Salem\nB. Boise\nC. Denver\nD. Helena{SUFFIX}"
    assert [question.id for question in (first, second, third)] == ["5", "17", "21"]
    assert third.visuals[0].open()[0].mode == "RGB"


def test_questions_of_the_tables(folder: Path, tables: Tables):
    """Those with an image, with the same texts."""
    asked = BENCHMARK.from_tables(tables)
    with_image = [question for question in BENCHMARK.from_folder(folder) if question.visuals]
    assert [(each.text, each.prompt) for each in asked] == [(each.text, each.prompt) for each in with_image]
    assert [question.id for question in asked] == ["0", "1"]
    assert asked[0].visuals[0].open()[0].tobytes() == with_image[0].visuals[0].open()[0].tobytes()
    assert BENCHMARK.truth_from_tables(tables) == {"0": Problem(1, 2), "1": Problem(3, 4)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", None),
        ("b", None),
        ("A.", None),  # no blank after it
        ("A. ", "A"),
        ("B. plastic", "B"),
        ("F. plastic", None),
        ("The answer is C.", "C"),
        ("The answer is C", None),  # the dot stands for a character
        ("The answer is C!", "C"),
        ("The answer is Z.", "Z"),
        ("So. The answer is B. The answer is B.", None),
        ("(A)", None),
        ("AB", None),
        ("", None),
    ],
)
def test_letter(text, expected):
    assert letter(text) == expected


def answer(name: str | int, text: str, image: bool = True) -> Answer:
    return Answer(name, text, "<image>\nWhy?" if image else "Why?")


TRUTH = {"1": Problem(0, 2), "2": Problem(1, 2), "3": Problem(2, 3), "4": Problem(2, 2)}


def test_score():
    """Of three with an image one is right; a letter beyond the options is wrong; the fourth has no image."""
    answers = [answer("2", "B", image=False), answer(1, "A"), answer("3", "hm"), answer("4", "C")]
    result = score(answers, TRUTH)
    assert result.score == pytest.approx(100 / 3)
    assert result.parts == {"IMG": result.score, "all": 50}
    assert result.points == [1, 0, 0]
    expected = {"text": 100, "failed": 1, "image_questions": 3, "image_correct": 1, "correct": 2, "missing": 0}
    assert expected.items() <= result.details.items()


def test_a_missing_answer_is_wrong_among_all_but_not_among_those_with_an_image():
    """The official tool cannot know whether it had one."""
    result = score([answer("1", "A"), answer("9", "A")], TRUTH)
    assert (result.score, result.details["all"]) == (100, 25)
    assert (result.details["missing"], result.details["unexpected"]) == (3, 1)


def test_the_published_shape():
    """4,241 questions, 2,017 with an image; 3,155 and 1,445 right are LLaVA-1.5-13B's 74.39 and 71.64."""
    truth = {str(number): Problem(1, 2) for number in range(4241)}
    answers = [
        answer(str(number), "B" if number < 1445 or 2017 <= number < 2017 + 1710 else "A", number < 2017)
        for number in range(4241)
    ]
    result = score(answers, truth)
    assert f"{result.score:.2f} {result.details['all']:.2f}" == "71.64 74.39"


def test_truth_needs_two_files_only(tmp_path: Path):
    data.write_truth(tmp_path)
    assert BENCHMARK.truth_from_folder(tmp_path) == {"5": Problem(1, 2), "17": Problem(0, 3), "21": Problem(3, 4)}
    (tmp_path / "problems.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"problems\.json"):
        BENCHMARK.truth_from_folder(tmp_path)


@pytest.mark.parametrize("texts", [["B", "A", "D"], ["B. plastic", "A", "C"], ["A", "A", "A"]])
def test_expected_agrees(texts, folder: Path, tables: Tables):
    asked = BENCHMARK.from_folder(folder)
    answers = [Answer(question.id, text, question.prompt) for question, text in zip(asked, texts, strict=True)]
    assert score(answers, BENCHMARK.truth_from_folder(folder)).score == data.expected(texts)
    texts = [texts[0], texts[2]]
    asked = BENCHMARK.from_tables(tables)
    answers = [Answer(question.id, text, question.prompt) for question, text in zip(asked, texts, strict=True)]
    assert score(answers, BENCHMARK.truth_from_tables(tables)).score == data.expected(texts)


def test_bad_data(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="llava_test_CQM-A"):
        BENCHMARK.from_folder(tmp_path)
    path = tmp_path / "llava_test_CQM-A.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no list of questions"):
        BENCHMARK.from_folder(tmp_path)
    record = {"id": "5", "conversations": [{"from": "human", "value": "Why?"}]}
    path.write_text(json.dumps([record, record]))
    with pytest.raises(ValueError, match="more than once"):
        BENCHMARK.from_folder(tmp_path)
    with pytest.raises(ValueError, match="none of the 1 answers has <image> in its prompt"):
        score([answer("1", "A", image=False)], TRUTH)

"""MMMU: the official parser with its quirks, its draws, both kinds of truth, and the prompt."""

from __future__ import annotations

import random
from pathlib import Path

import data_mmmu as data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmarks.mmmu import BENCHMARK, Gold, score, subject_of
from eval.reading.tables import Tables
from eval.records import Answer
from eval.scoring.mmmu_parser import is_right, letter, open_candidates

properties = settings(max_examples=60, deadline=None)
OPTIONS = {"A": "cat", "B": "big dog", "C": "dog", "D": "hen"}


def test_questions(folder: Path):
    """Only the first image; its marker stays in the text."""
    asked = BENCHMARK.from_folder(folder)
    assert asked[0].text == (
        "<image 1> What is the balance?\n\n(A) $6 unearned\n(B) $7 unearned\n(C) $8 unearned\n\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert asked[2].text == ("Name what is shown in <image 1>.\n\nAnswer the question using a single word or phrase.")
    assert [question.category for question in asked] == ["Accounting", "Art_Theory", "Basic_Medical_Science"] + [
        "Math"
    ] * 2
    assert [len(question.visuals) for question in asked] == [1] * 5
    assert [question.visuals[0].open()[0].getpixel((0, 0))[1] for question in asked] == [0, 40, 80, 120, 160]


def test_both_sources_and_the_official_answers_agree(folder: Path, tables: Tables):
    strip = [(question.id, question.text) for question in BENCHMARK.from_tables(tables)]
    assert strip == [(question.id, question.text) for question in BENCHMARK.from_folder(folder)]
    truth = BENCHMARK.truth_from_tables(tables)
    assert truth == BENCHMARK.truth_from_folder(folder)
    assert truth["validation_Math_3"] == Gold(("24/7", "3.429"), True)
    assert truth["validation_Math_4"] == Gold(("A",), False, {"A": "Yes, it is convex", "B": "No, it isn't"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'B'", "B"),
        ("(B)", "B"),
        ("(A) or rather (C).", "C"),
        ("(A) is not B ", "A"),  # brackets first
        ("A and B", "B"),  # the last
        ("Not C but B here", "B"),
        ("DNA ", None),  # lmms-eval says A
        ("A. cat", None),
        ("The best option is DNA because", None),
        ("I think that it is a hen", "D"),
        ("I think that it is a CAT, no, hen", "D"),
        ("it is a big dog I think", "C"),  # "dog" comes later than "big dog"
        ("a hen", None),  # not more than five words
        ("", None),
        ("E", None),
        ("b", None),
    ],
)
def test_letter(text, expected):
    assert letter(text, OPTIONS) == expected


def test_marks_are_stripped_once_each_in_order():
    """The comma is stripped before the full stop, and not after it again."""
    assert letter("B.,", OPTIONS) == "B"
    assert letter("B,.", OPTIONS) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("36 watts", {"36 watts", 36.0}),
        ("So x = 3.14159", {3.14}),
        ("$1,234.5", {"$1,234.5", 1234.0, 234.5}),
        ("The answer is 5.\nIt could be 7", {5.0, 7.0}),
        ("x = 5\nfine", {"x = 5\nfine", 5.0}),  # = announces only in the last line
        ("the result is 1.5e3", {1500.0, 1.0, 3.0}),  # parts of it are plain numbers, too
        ("Right", {"right"}),
        ("x", {" x", "x "}),
        ("The answer is .", {"is"}),  # the end after "is " is empty, and gives way to that after "answer "
        ("", {""}),
        ("is so that", {"that"}),
        ("so it is ", {"it is"}),  # blanks around the answer are stripped first
        ("-12,000", {-12000.0, 0.0}),
    ],
)
def test_open_candidates(text, expected):
    assert {*open_candidates(text)} == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("36 watts", ["36"], True),
        ("30", ["30"], True),
        ("30.004", ["30"], True),
        ("30.006", ["30"], False),
        ("It is a dog", ["dog"], True),
        ("hotdog", ["dog"], True),  # a part is enough
        ("The answer is 3.4286", ["24/7", "3.429"], True),
        ("24/7", ["24/7", "3.429"], True),
        ("x", ["X"], True),
        ("box", ["x"], False),  # a single character needs a blank beside it
        ("a x b", ["x"], True),
        ("1,000", ["1000"], True),
        ("0.0", ["1.06"], False),
        ("nan", ["nan"], False),
        ("", ["dog"], False),
    ],
)
def test_is_right(text, answers, expected):
    assert is_right(text, answers) is expected


@properties
@given(st.integers(-(10**6), 10**6))
def test_numbers_equal_themselves_however_written(number):
    assert is_right(f"{number:,}", [str(number)])
    assert is_right(str(number), [f"{number:,}"])
    assert is_right(f"The answer is {number}", [str(number)])


@properties
@given(st.text(max_size=40), st.text(min_size=1, max_size=5))
def test_any_text_is_parsed(text, gold):
    is_right(text, [gold])
    assert letter(text, OPTIONS) in {None, *OPTIONS}


def test_draws_are_those_of_the_official_seed():
    """In the order of subjects' names, then of the data, whatever the order of the answers."""
    random.seed(42)
    draws = [random.choice(["A", "B", "C", "D"]) for _ in range(3)]
    assert draws == ["A", "A", "C"]
    truth = {
        "validation_Math_2": Gold(("A",), False, OPTIONS),
        "validation_Math_10": Gold(("C",), False, OPTIONS),
        "validation_Art_9": Gold(("A",), False, OPTIONS),
        "validation_Art_11": Gold(("D",), False, OPTIONS),
    }
    answers = [Answer(name, "D" if name == "validation_Art_11" else "?") for name in truth]
    for order in (answers, answers[::-1]):
        result = score(order, truth)
        assert (result.score, result.details["random"]) == (100, 3)
    truth["validation_Art_9"] = Gold(("B",), False, OPTIONS)
    assert score(answers, truth).points == [1, 1, 0, 1]


def test_bare_answers_where_options_are_not_known(tmp_path: Path):
    """The official format: what it has is parsed already, and only the very letter counts."""
    data.write_truth(tmp_path)
    truth = BENCHMARK.truth_from_folder(tmp_path)
    texts = ["B", "(D)", "the hormone", "3.43", "A"]
    answers = [Answer(row["id"], text) for row, text in zip(data.ROWS, texts, strict=True)]
    result = score(answers, truth)
    assert result.score == 80
    assert (result.details["random"], result.details["not_letters"]) == (0, 1)
    assert result.details["multiple_choice"] == pytest.approx(200 / 3)
    assert result.details["open"] == 100
    assert result.details["subjects"] == {"Accounting": 100, "Art_Theory": 0, "Basic_Medical_Science": 100, "Math": 100}
    assert result.parts == {"Art and Design": 0, "Business": 100, "Science": 100, "Health and Medicine": 100}


def test_raw_answers_that_bring_their_options(tmp_path: Path):
    """The official output.json of a subject: parsed with its index2ans, though only the official truth is there."""
    data.write_truth(tmp_path / "mmmu")
    truth = BENCHMARK.truth_from_folder(tmp_path)  # at any depth
    options = {"index2ans": {"A": "$6 unearned", "B": "$7 unearned", "C": "$8 unearned"}}
    assert score([Answer("validation_Accounting_1", "The answer is (B).", "", options)], truth).score == 100
    assert score([Answer("validation_Accounting_1", "The answer is (B).")], truth).score == 0
    result = score([Answer("validation_Accounting_1", "?", "", options)], truth)
    assert (result.details["random"], result.details["not_letters"]) == (1, 0)


def test_images_that_could_not_be_read_are_wrong(folder: Path):
    """Without a draw: the official seed's first of A, B and C would be right for a gold answer of C."""
    truth = {"validation_Math_2": Gold((random.Random(42).choice("ABC"),), False, dict.fromkeys("ABC", "x"))}
    assert score([Answer("validation_Math_2", "")], truth).score == 100
    result = score([Answer("validation_Math_2", "", "", {"error": "there is no image"})], truth)
    assert (result.score, result.details["random"], result.details["unreadable"]) == (0, 0, 1)


def test_missing_answers_do_not_count(folder: Path):
    """The official tools divide by the answers that there are."""
    result = score(
        [Answer("validation_Accounting_1", "B"), Answer("validation_Pop_1", "B")], BENCHMARK.truth_from_folder(folder)
    )
    assert (result.score, result.details["missing"], result.details["unexpected"]) == (100, 4, 1)


def test_the_published_shape():
    """324 and 330 right of 900 are the official examples' 0.360 and 0.367."""
    truth = {f"validation_Math_{number}": Gold(("A",), False) for number in range(900)}
    for right, printed in ((324, "0.360"), (330, "0.367")):
        answers = [Answer(name, "A" if number < right else "B") for number, name in enumerate(truth)]
        assert f"{score(answers, truth).score / 100:.3f}" == printed


@pytest.mark.parametrize(
    "texts", [["B", "(D)", "hormone", "24/7", "A"], ["x"] * 5, ["A", "B", "it is a Hormone", "3.43", "B."]]
)
def test_expected_agrees(texts, folder: Path):
    answers = [Answer(row["id"], text) for row, text in zip(data.ROWS, texts, strict=True)]
    assert score(answers, BENCHMARK.truth_from_folder(folder)).score == pytest.approx(data.expected(texts))


def test_subject_of():
    assert subject_of("validation_Diagnostics_and_Laboratory_Medicine_30") == "Diagnostics_and_Laboratory_Medicine"


def test_bad_data(tmp_path: Path, folder: Path):
    with pytest.raises(FileNotFoundError, match=r"hf download --repo-type dataset lmms-lab/MMMU"):
        BENCHMARK.from_folder(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"answer_dict_val\.json .*hf download"):
        BENCHMARK.truth_from_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="none of the 1 answers"):
        score([Answer("test_Math_1", "B")], BENCHMARK.truth_from_folder(folder))

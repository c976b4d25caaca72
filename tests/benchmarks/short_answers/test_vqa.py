"""Normalising open answers, and VQA accuracy in its variants."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.records import Answer
from eval.scoring.matching import match
from eval.scoring.vqa import (
    CONTRACTIONS,
    Annotation,
    lmms_accuracy,
    normalise,
    normalise_on_server,
    score_uploaded,
    server_accuracy,
    soft_accuracy,
    ten,
    textvqa_accuracy,
    uploaded_accuracy,
)

properties = settings(max_examples=200, deadline=None)

# Results of the official code (benchmarks.md, section 3.1).
VECTORS = {
    "The Dog.": "dog",
    "3.5": "3.5",
    "1,000": "1000",
    "$1,000.50": "$1000.50",
    "U.S.A.": "usa",
    "dont": "don't",
    "its": "its",
    "two dogs": "2 dogs",
    "a/b": "b",
    "red-and-blue": "red and blue",
    "hot - dog": "hot dog",
    "9:30 am": "9:30 am",
    "john's": "john 's",
    "none": "0",
    "None of the above": "0 of above",
    "(left)": "left",
    "1.5.2": "1.5.2",
    "left;right": "left right",
    "twenty-one": "twenty 1",
    "100%": "100%",
    "St. Louis": "st louis",
    "e.g. this": "eg this",
    "oclock": "o'clock",
    "5,5 cm": "55 cm",
    "yes\nno": "yes no",
    "Id've": "id've",
}


@pytest.mark.parametrize(("text", "normal"), VECTORS.items())
def test_answers_are_normalised_as_by_the_official_code(text: str, normal: str):
    assert normalise(text) == normal


def test_the_server_has_no_first_step():
    assert normalise_on_server("john's") == "john's"
    assert normalise_on_server("What?") == "what"  # nothing comes after the mark, so that a blank takes its place
    assert normalise_on_server("1,000 - 2-3") == "1000 23"  # a comma in a number: all marks are dropped
    assert normalise_on_server("1,,000-2") == "10002"  # however many commas
    assert normalise_on_server("red,blue") == "red blue"


def test_conditions_look_at_the_text_before_the_step():
    """The blank that the first mark leaves does not make the second one vanish."""
    assert normalise("a;/b") == "b"
    assert normalise("left;/right") == "left right"
    assert normalise("x-y - z") == "xy z"  # one dash beside a blank: all of them vanish


@pytest.mark.parametrize("mark", ":'#$%&*^~|")
def test_other_marks_stay(mark: str):
    assert normalise(f"x{mark}y {mark} z") == f"x{mark}y {mark} z"


def test_only_32_full_stops_are_dropped():
    """The official code hands a flag over where the count belongs."""
    assert normalise("." * 40 + "x") == "." * 8 + "x"
    assert normalise(".5") == ".5"
    assert normalise("5.") == "5"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("aint", "ain't"),
        ("yall", "y'all"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("ow's'at", "ow 's'at"),  # the first step tears it apart
        ("'ow'sat", "'ow 'sat"),
        ("somebody'd", "somebodyd"),
        ("let's", "let 's"),
        ("yalld've", "yalld've"),
        ("yall'd've", "y'all'd've"),
        ("Im", "im"),  # lower case by then
        ("were", "were"),
        ("shes", "shes"),
    ],
)
def test_contractions(written: str, meant: str):
    assert normalise(written) == meant


def test_the_contraction_table_is_the_official_one():
    assert len(CONTRACTIONS) == 120
    plain = {word: meant for word, meant in CONTRACTIONS.items() if word == meant.replace("'", "")}
    assert len(plain) == 75
    assert CONTRACTIONS["'ows'at"] == CONTRACTIONS["ow's'at"] == "'ow's'at"
    assert CONTRACTIONS["twas"] == "'twas"
    assert CONTRACTIONS["she's"] == "she's"


@properties
@given(st.text(alphabet=string.printable))
def test_normal_answers_have_no_capitals_articles_or_wide_blanks(text: str):
    normal = normalise(text)
    assert normal == normal.lower() == " ".join(normal.split())
    assert not {"a", "an", "the", "none", "zero", "ten"} & set(normal.split())
    assert not set(';/[]"{}()=+\\_-><@`,?!') & set(normal)


# Accuracy


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_accuracy_by_the_number_of_people_who_agree(agree: int, accuracy: float):
    humans = ["cat"] * agree + ["dog"] * (10 - agree)
    assert soft_accuracy("cat", humans) == pytest.approx(accuracy, abs=1e-12)


@properties
@given(st.lists(st.sampled_from(["cat", "dog", "2"]), min_size=10, max_size=10), st.randoms())
def test_the_order_of_the_people_does_not_matter(humans: list[str], random):
    mixed = random.sample(humans, 10)
    assert soft_accuracy("cat", mixed) == pytest.approx(soft_accuracy("cat", humans), abs=1e-12)


def test_textvqa_normalises_both_sides():
    assert textvqa_accuracy("The Dakota.", ["dakota"] * 9 + ["DAKOTA!"]) == 1
    assert textvqa_accuracy("john's", ["john 's"] * 10) == 1


def test_the_server_compares_as_typed_where_all_people_agree():
    assert server_accuracy("cat", ["Cat"] * 10) == 0
    assert server_accuracy("Cat", ["Cat"] * 10) == 1
    assert server_accuracy(" Cat\n", ["Cat"] * 9 + ["Cat "]) == 1  # blanks around are no difference
    assert server_accuracy("cat", ["Cat"] * 9 + ["dog"]) == 1  # nine of ten: normalised


def test_the_variants_differ():
    """For the same answer to the same people."""
    assert uploaded_accuracy("Yes.", ["yes"] * 10) == 1  # LLaVA normalises before it uploads
    assert server_accuracy("Yes.", ["yes"] * 10) == 0
    assert lmms_accuracy("Yes.", ["yes"] * 10) == 1
    assert uploaded_accuracy("John's", ["john's"] * 9 + ["his"]) == 0  # it uploads "john 's"
    assert lmms_accuracy("John's", ["john's"] * 9 + ["his"]) == 1
    assert textvqa_accuracy("John's", ["john's"] * 9 + ["his"]) == 1


def test_ten_people_answer_each_question():
    assert ten(iter("abcdefghij"), "question 1") == tuple("abcdefghij")
    with pytest.raises(ValueError, match="question 7 has 9 people's answers, not 10"):
        ten(["yes"] * 9, "question 7")


def test_the_score_of_uploaded_answers():
    annotations = {
        1: Annotation(("yes",) * 10, "yes/no"),
        2: Annotation(("red",) * 2 + ("blue",) * 8, "other"),
        3: Annotation(("",) * 9 + ("cup",), "other"),  # people's empty answers agree with none
    }
    score = score_uploaded(match([Answer(1, "Yes."), Answer(2, "Red")], annotations), annotations, "VQA accuracy, %")
    assert score.score == pytest.approx(100 * (1 + 0.6 + 1) / 3)
    assert score.parts == pytest.approx({"other": 80, "yes/no": 100})
    assert score.details["missing"] == 1
    assert score.details["by_answer_type"]["other"] == {"accuracy": pytest.approx(80), "questions": 2}
    assert score.details["other_variants"] == pytest.approx(
        {"official tool, answers as they are": 100 * (0 + 0.6 + 1) / 3, "lmms-eval": 100 * (1 + 0.6 + 1) / 3}
    )
    assert score.points is None


def test_an_image_that_could_not_be_read_is_wrong():
    """Also where people's own answers are empty once they are normalised."""
    annotations = {1: Annotation(("a",) * 10), 2: Annotation(("yes",) * 10)}
    answers = [Answer(1, "", "", {"error": "there is no image"}), Answer(2, "yes")]
    score = score_uploaded(match(answers, annotations), annotations, "VQA accuracy, %")
    assert score.score == 50
    assert score.details["other_variants"]["lmms-eval"] == 50
    assert score.details["unreadable"] == 1

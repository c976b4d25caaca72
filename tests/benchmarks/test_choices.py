"""How options are asked, and how answers meet their questions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmark import Answer
from eval.choices import accuracies, accuracy, ask, join, key, lettered, listed


def test_ask():
    assert ask("How many?", ["One", "Two"]) == (
        "How many?\nA. One\nB. Two\nAnswer with the option's letter from the given choices directly."
    )
    assert listed("Why?", []) == "Why?"
    assert list(lettered(["x"] * 5)) == ["A", "B", "C", "D", "E"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [(101669, "101669"), ("101669", "101669"), ("007", "7"), ("v0", "v0"), ("validation_Art_1", "validation_Art_1")],
)
def test_numbers_are_the_same_as_text(name, expected):
    assert key(name) == expected


def test_join_counts_what_does_not_fit():
    """Of two answers to a question the last counts, in the first one's place."""
    answers = [Answer("2", "first"), Answer(9, "lost"), Answer(1, "only"), Answer(2, "last")]
    found, counts = join(answers, {"1": None, "2": None, "3": None})
    assert [(name, answer.text) for name, answer in found.items()] == [("2", "last"), ("1", "only")]
    assert counts == {"questions": 3, "answers": 4, "missing": 1, "unexpected": 1, "repeated": 1}


@pytest.mark.parametrize("answers", [[], [Answer("v7", "A")]])
def test_answers_of_another_benchmark(answers):
    with pytest.raises(ValueError, match=r"none of the \d answers .* give the answers file and the data of the same"):
        join(answers, ["1"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20), min_size=1))
def test_every_answer_and_question_is_counted_once(ids, keys):
    names = {str(each) for each in keys}
    if not {*ids} & keys:
        return
    found, counts = join([Answer(each, "A") for each in ids], names)
    assert len(found) + counts["missing"] == len(names)
    assert len(found) + counts["unexpected"] + counts["repeated"] == len(ids)


def test_accuracy():
    assert accuracy([1, 0, 0, 1]) == 50
    assert accuracies([("b", 1), ("a", 0), ("b", 0), ("b", 0)]) == {"b": pytest.approx(100 / 3), "a": 0}

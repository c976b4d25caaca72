"""How answers meet their questions, and means over these."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.records import Answer
from eval.scoring.matching import match, percent, percent_by, unreadable


def test_answers_are_found_by_number_or_digits():
    matched = match([Answer("2", "two"), Answer(1, "one")], [1, 2, 3])
    assert {name: answer.text for name, answer in matched.answers.items()} == {1: "one", 2: "two"}
    nothing_else = {"unexpected": 0, "repeated": 0, "unreadable": 0}
    assert matched.counts == {"questions": 3, "answers": 2, "missing": 1, **nothing_else}
    assert matched.in_order({1: 0.1, 2: 0.2, 3: 0.3}) is None  # one is missing


def test_of_two_answers_the_last_counts():
    """In the first one's place."""
    matched = match([Answer("2", "first"), Answer(9, "lost"), Answer(1, "only"), Answer(2, "last")], ["1", "2", "3"])
    assert [(name, answer.text) for name, answer in matched.answers.items()] == [("2", "last"), ("1", "only")]
    assert matched.ids == ["2", None, "1", "2"]
    counts = {"questions": 3, "answers": 4, "missing": 1, "unexpected": 1, "repeated": 1, "unreadable": 0}
    assert matched.counts == counts


def test_zeros_in_front_are_part_of_an_id():
    """GQA has them."""
    assert match([Answer("05451384", "")], ["5451384", "05451384"]).ids == ["05451384"]


def test_points_are_in_the_answers_order():
    assert match([Answer(2, ""), Answer(1, "")], [1, 2]).in_order({1: 0.3, 2: 1}) == [1, 0.3]


def test_images_that_could_not_be_read_are_counted():
    answers = [Answer(1, "", "", {"error": "there is no image 1.jpg"}), Answer(2, "", "", {"error": None})]
    assert [unreadable(answer) for answer in answers] == [True, False]
    assert match(answers, [1, 2]).counts["unreadable"] == 1


def test_answers_of_another_benchmark():
    with pytest.raises(ValueError, match=r"none of the 1 answers \(the first is to 'v7'\) .* the same benchmark"):
        match([Answer("v7", "A")], ["1"])
    with pytest.raises(ValueError, match="there are no answers"):
        match([], ["1"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20), min_size=1))
def test_every_answer_and_question_is_counted_once(ids, keys):
    if not {*ids} & keys:
        return
    matched = match([Answer(each, "A") for each in ids], map(str, keys))
    assert len(matched.answers) + matched.counts["missing"] == len(keys)
    assert len(matched.answers) + matched.counts["unexpected"] + matched.counts["repeated"] == len(ids)


def test_percent():
    assert percent([1, 0, 0, 1]) == 50
    assert percent_by([("b", 1), ("a", 0), ("b", 0), ("b", 0)]) == {"b": pytest.approx(100 / 3), "a": 0}

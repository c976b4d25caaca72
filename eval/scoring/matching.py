"""How answers meet their questions, and means over these: what all scorers share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..records import Answer

Id = TypeVar("Id", bound=Hashable)
Gold = TypeVar("Gold")


@dataclass(frozen=True)
class Matched(Generic[Id]):
    """Answers by their questions.

    Attributes:
        answers: by the question's id; of several to one question the last, as LLaVA's scripts take it.
        ids: the question of each answer, None where there is no such question.
        counts: of questions and answers; of answers that are missing, to no question, second ones to a question, or to
            an unreadable image, see :func:`unreadable`.
    """

    answers: Mapping[Id, Answer]
    ids: Sequence[Id | None]
    counts: Mapping[str, int]

    def in_order(self, points: Mapping[Id, float]) -> list[float] | None:
        """The questions' points in the answers' order; None where an answer is missing or one too many."""
        whole = not any(self.counts[name] for name in ("missing", "unexpected", "repeated"))
        return [points[name] for name in self.ids] if whole else None


def match(answers: Sequence[Answer], ids: Iterable[Id], name: Callable[[Answer], Any] | None = None) -> Matched[Id]:
    """Find each answer's question.

    Args:
        answers: in any order.
        ids: of the questions.
        name: what an answer says of its question; by default its id. Numbers and their digits are the same.

    Raises:
        ValueError: no answer is to any of these questions.
    """
    questions = {str(one): one for one in ids}
    found = [questions.get(str(name(answer) if name else answer.question_id)) for answer in answers]
    by_id = {one: answer for one, answer in zip(found, answers, strict=True) if one is not None}
    if not answers:
        raise ValueError("there are no answers: give the file that a run wrote")
    if not by_id:
        raise ValueError(
            f"none of the {len(answers)} answers (the first is to {answers[0].question_id!r}) is to one of the "
            f"{len(questions)} questions (the first is {next(iter(questions), None)!r}): give the answers file and the "
            "data of the same benchmark"
        )
    unexpected = found.count(None)
    counts = {
        "questions": len(questions),
        "answers": len(answers),
        "missing": len(questions) - len(by_id),
        "unexpected": unexpected,
        "repeated": len(answers) - unexpected - len(by_id),
        "unreadable": sum(map(unreadable, by_id.values())),
    }
    return Matched(by_id, found, counts)


def asked(answers: Sequence[Answer], truth: Mapping[Id, Gold], name: Callable[[Answer], Any] | None = None) -> Any:
    """The part of a truth that some answers are to, in its order: what a run with ``--limit`` is compared with.

    Args:
        answers: to the questions that were asked.
        truth: by the questions' ids.
        name: see :func:`match`.
    """
    there = match(answers, truth, name).answers
    return {one: gold for one, gold in truth.items() if one in there}


def shortfalls(counts: Mapping[str, Any], missing: str) -> list[str]:
    """What keeps a score from being that of a whole, sound set of answers, a sentence for each kind; mostly none.

    Args:
        counts: see :class:`Matched`; and ``half_written_lines``, of an answers file. What is not there is none.
        missing: what becomes of questions without an answer, see :class:`eval.benchmark.Benchmark`.
    """
    sentences = {
        "missing": f"of {counts.get('questions', counts.get('items'))} questions have no answer: these {missing}",
        "unexpected": "answers are to no question here: they do not count",
        "unreadable": "questions were not asked, as their image or video could not be read: they are wrong",
        "half_written_lines": "line at the end is half written: it is left out",
    }
    return [f"{counts[kind]} {sentence}" for kind, sentence in sentences.items() if counts.get(kind)]


def unreadable(answer: Answer) -> bool:
    """Whether the model was not asked, as its image or video could not be read: then its field ``error`` says why.

    Such an answer is wrong in every benchmark, also where an empty text may be right (POPE, MMMU), and no judge is
    asked about it.
    """
    return bool(answer.extra.get("error"))


def percent(points: Collection[float]) -> float:
    """100 times the mean of points; there must be some."""
    return 100 * (sum(points) / len(points))


def percent_by(points: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The percentage of each group, from pairs of a group and a point; groups as they come."""
    groups: dict[str, list[float]] = {}
    for group, point in points:
        groups.setdefault(group, []).append(point)
    return {group: percent(of_group) for group, of_group in groups.items()}

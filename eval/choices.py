"""What the multiple-choice benchmarks share: how options are asked, and how answers meet their questions."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Sequence

from eval.benchmark import Answer

LETTER = "Answer with the option's letter from the given choices directly."


def lettered(options: Iterable[str]) -> dict[str, str]:
    """Options by their letters, from A."""
    return dict(zip(string.ascii_uppercase, options, strict=False))


def listed(question: str, options: Iterable[str]) -> str:
    """A question and its options, one on each line, as ``A. text``. Source: LLaVA's question files and scripts."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in lettered(options).items())])


def ask(question: str, options: Iterable[str], instruction: str = LETTER) -> str:
    """The user's turn: the question, its options and the instruction, each on a line of its own."""
    return f"{listed(question, options)}\n{instruction}"


def key(name: str | int) -> str:
    """A question's id for comparison: data and answers files differ in whether numbers are strings."""
    text = str(name)
    return str(int(text)) if text.isdecimal() else text


def join(answers: Sequence[Answer], keys: Collection[str]) -> tuple[dict[str, Answer], dict[str, int]]:
    """Answers by their question's key, in their own order, and counts of what does not fit.

    Args:
        answers: in any order. Of several to one question the last is kept, as LLaVA's scorers do.
        keys: of the questions, by :func:`key`.

    Returns:
        The answers to these questions; how many questions and answers there are, questions without an answer
        (``missing``), answers to no question (``unexpected``), and further answers to the same one (``repeated``).

    Raises:
        ValueError: no answer is to any of the questions.
    """
    named = [(key(answer.question_id), answer) for answer in answers]
    found = {name: answer for name, answer in named if name in keys}
    if not found:
        has = f"the first is to {answers[0].question_id!r}" if answers else "there are none"
        raise ValueError(
            f"none of the {len(answers)} answers ({has}) is to one of the {len(keys)} questions "
            f"(the first is {next(iter(keys), None)!r}): give the answers file and the data of the same benchmark"
        )
    unexpected = sum(name not in keys for name, _ in named)
    return found, {
        "questions": len(keys),
        "answers": len(answers),
        "missing": len(keys) - len(found),
        "unexpected": unexpected,
        "repeated": len(answers) - unexpected - len(found),
    }


def accuracy(points: Collection[float]) -> float:
    """The mean of points from 0 to 1, in percent; there must be some."""
    return sum(points) / len(points) * 100


def accuracies(points: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The accuracy of each group, in percent, from pairs of a group and a point; groups as they come."""
    groups: dict[str, list[float]] = {}
    for group, point in points:
        groups.setdefault(group, []).append(point)
    return {group: accuracy(of_group) for group, of_group in groups.items()}

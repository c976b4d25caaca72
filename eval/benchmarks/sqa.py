"""ScienceQA: school questions with two to five options, about half of them with an image.

Data: LLaVA's folder has all 4,241 questions of the test split, 2,017 of them with an image. The hub's data are the
2,017 (``ScienceQA-IMG``, which has no ids: a question's is the number of its row); its texts are the same.
Prompt: context (where there is one), question, options, and LLaVA's instruction for a letter.
Metric: accuracy on the questions with an image, read off the answers as LLaVA's ``eval_science_qa.py`` does: a bare
letter, a letter with ``. `` after it, or one ``The answer is X.``; anything else has failed, and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, LETTER, listed
from ..reading.sources import need, picture, read_json, refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table, UnscoredError
from ..scoring.matching import match, percent

if TYPE_CHECKING:
    from ..scoring.judge import Judge

_QUESTIONS = "llava_test_CQM-A.json"
_LETTERS = "ABCDE"
_IMAGE = "<image>"


@dataclass(frozen=True)
class Problem:
    """What an answer is compared with: the right option's number, from 0, and how many options there are."""

    answer: int
    choices: int


def questions(folder: Path) -> list[Question]:
    """The questions of LLaVA's file, in its order.

    Raises:
        ValueError: the file is not LLaVA's.
    """
    path = folder / _QUESTIONS
    if not isinstance(records := read_json(path), list):
        raise ValueError(f"{path} is no list of questions: fetch it again")
    asked = []
    for number, record in enumerate(records):
        where = f"record {number} of {path}"
        turns = need(record, "conversations", where)
        text = need(turns[0], "value", where).replace(_IMAGE, "").strip()
        visuals = (picture(folder / "images" / "test" / record["image"]),) if "image" in record else ()
        asked.append(_question(need(record, "id", where), f"{text}\n{LETTER}", visuals))
    refuse_repeated((question.id for question in asked), str(path))
    return asked


def questions_of_tables(tables: Tables) -> list[Question]:
    """The questions of ``ScienceQA-IMG``, in the order of its rows."""
    rows = tables["test"]
    asked = []
    for index, row in enumerate(rows.without("image")):
        where = f"{rows.name} row {index}"
        hint = need(row, "hint", where)
        context = f"Context: {hint}\n" if hint else ""
        text = listed(context + need(row, "question", where), need(row, "choices", where)).strip()
        asked.append(_question(str(index), f"{text}\n{LETTER}", (rows.picture(index),)))
    return asked


def _question(name: str, text: str, visuals: tuple[Any, ...]) -> Question:
    # The prompt in the answers file says whether there was an image: the scorer goes by that.
    return Question(name, text, visuals, prompt=f"{_IMAGE}\n{text}" if visuals else text)


def truth(folder: Path) -> dict[str, Problem]:
    """The problems of the test split, from ``pid_splits.json`` and ``problems.json``."""
    splits, problems = (read_json(folder / name) for name in ("pid_splits.json", "problems.json"))
    names = need(splits, "test", str(folder / "pid_splits.json"))
    return {str(name): _problem(need(problems, name, "problems.json"), f"problem {name}") for name in names}


def truth_of_tables(tables: Tables) -> dict[str, Problem]:
    """The problems of ``ScienceQA-IMG``, by the numbers of their rows."""
    rows = tables["test"]
    return {str(index): _problem(row, f"row {index}") for index, row in enumerate(rows.without("image"))}


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    return Problem(int(need(row, "answer", where)), len(need(row, "choices", where)))


def letter(text: str) -> str | None:
    """The letter that an answer chooses; None if it has failed to. Source: LLaVA's ``eval_science_qa.py``."""
    if len(text) == 1 and text in _LETTERS:
        return text
    if len(text) >= 3 and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)  # the last dot stands for any character there, too
    return said[0] if len(said) == 1 else None


def score(answers: Sequence[Answer], truth: Mapping[str, Problem], judge: Judge | None = None) -> Score:
    """Accuracy on the questions with an image, in percent.

    Which these are is seen in the prompts of the answers. So, as in the official tool, a question without an answer
    counts as wrong among all, but not among those with an image. ``points`` are those of the answers with an image.

    Raises:
        ValueError: no answer is to a question here.
        UnscoredError: none was asked with an image.
    """
    matched = match(answers, truth)
    found = matched.answers
    chosen = {name: letter(answer.text) for name, answer in found.items()}
    right = {name: float(_is_right(chosen[name], truth[name])) for name in found}
    with_image = [right[name] for name, answer in found.items() if _IMAGE in answer.prompt]
    without = [right[name] for name, answer in found.items() if _IMAGE not in answer.prompt]
    if not with_image:
        raise UnscoredError(
            f"none of the {len(found)} answers has {_IMAGE} in its prompt, where LLaVA notes that there was an image: "
            "the headline is over those that have"
        )
    image, everything = percent(with_image), sum(right.values()) / len(truth) * 100
    details = {
        "image": image,
        "all": everything,
        **({"text": percent(without)} if without else {}),
        "image_questions": len(with_image),
        "image_correct": int(sum(with_image)),
        "correct": int(sum(right.values())),
        "failed": sum(each is None for each in chosen.values()),
        **matched.counts,
    }
    return Score("accuracy on questions with an image", image, details, {"IMG": image, "all": everything}, with_image)


def _is_right(chosen: str | None, problem: Problem) -> bool:
    # A letter beyond the problem's options is wrong even where the gold answer is beyond them, too.
    return chosen is not None and chosen in _LETTERS[: problem.choices] and _LETTERS.index(chosen) == problem.answer


_SCIENCEQA = "https://github.com/lupantech/ScienceQA, folder data/scienceqa"

BENCHMARK = Benchmark(
    name="sqa",
    title="SQA",
    summary="science questions with options, those with an image (accuracy; 4,241 questions, 2,017 with an image)",
    folder="scienceqa",
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File("images/test/", f"{_SCIENCEQA}: download test.zip as its README says, and unpack it into images/", "run"),
        File("pid_splits.json", _SCIENCEQA, "score"),
        File("problems.json", _SCIENCEQA, "score"),
    ),
    tables={"test": Table("lmms-lab/ScienceQA", "test", "ScienceQA-IMG")},
    max_new_tokens=1024,
    from_folder=questions,
    from_tables=questions_of_tables,
    truth_from_folder=truth,
    truth_from_tables=truth_of_tables,
    score=score,
    missing="count as wrong among all, and not at all among those with an image",
)

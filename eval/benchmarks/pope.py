"""POPE: is there such an object in the image? 8910 yes/no questions about COCO images that bait hallucinations.

Data: LLaVA's ``llava_pope_test.jsonl`` with the labels of POPE at commit e3e39262 (random has 2910 questions there), or
``lmms-lab/POPE``, config ``Full``, on the hub. The hub's random split is other data: 3000 questions of today's POPE;
about fifty of popular and of adversarial differ in wording. Its own ids repeat over the splits, so that the questions
get LLaVA's (1…, 10000001…, 20000001…). Prompt: the question and LLaVA's request for a single word.

Metric: LLaVA's ``eval_pope.py``; the headline is the mean of the three F1. An answer is no if the part before its first
full stop has one of the words No, no and not, else yes, even if it is empty. Labels belong to questions by their
position in the category, as there. Answers, however, are found by question id, not by their own position: for a
complete file in order this is the same, and where answers are missing (they do not count) or in another order the
others keep their labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, SHORT_ANSWER, read_questions
from ..reading.sources import need, read_jsonl
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table, Visual
from ..scoring.matching import match, unreadable

_QUESTIONS = "llava_pope_test.jsonl"
_FIRST_IDS = {"adversarial": 1, "popular": 20_000_001, "random": 10_000_001}
_LABELS = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


@dataclass(frozen=True)
class Label:
    """What is right for a question.

    Attributes:
        category: adversarial, popular or random.
        question: as the labels' file has it, for comparison with what was asked.
        yes: the object is there.
    """

    category: str
    question: str
    yes: bool


def from_folder(folder: Path) -> list[Question]:
    """The questions of ``llava_pope_test.jsonl``, about images in ``val2014``."""
    path = folder / _QUESTIONS
    questions = read_questions(path, folder / "val2014")
    if unknown := {question.category for question in questions} - set(_FIRST_IDS):
        raise ValueError(f"{path} has questions of the category {min(unknown)!r}: known are {', '.join(_FIRST_IDS)}")
    return questions


def from_tables(tables: Tables) -> list[Question]:
    """The hub's questions: adversarial, popular, random; questions about an image share it."""
    questions, images = [], dict[str, Visual]()
    for category, first in _FIRST_IDS.items():
        rows = tables[category]
        for index, (text, name) in enumerate(zip(rows.column("question"), rows.column("image_source"), strict=True)):
            image = images.setdefault(name, rows.picture(index))
            questions.append(Question(first + index, text.strip() + SHORT_ANSWER, (image,), category))
    return questions


def truth_from_folder(folder: Path) -> dict[str, Label]:
    """Labels by question id, from ``coco/coco_pope_*.json`` (or where these lie without that folder).

    The n-th label of a category is that of its n-th question; without ``llava_pope_test.jsonl``, of its n-th id.

    Raises:
        FileNotFoundError: a file of labels is missing.
        ValueError: one is damaged, or has more or fewer labels than there are questions.
    """
    ids: dict[str, list[Any]] = {}
    if (folder / _QUESTIONS).is_file():
        for question in from_folder(folder):
            ids.setdefault(question.category, []).append(question.id)
    labels_folder = (
        folder / "coco" if (folder / "coco").is_dir() or not any(folder.glob("coco_pope_*.json")) else folder
    )
    truth = {}
    for category, first in _FIRST_IDS.items():
        path = labels_folder / f"coco_pope_{category}.json"
        labels = [
            Label(category, row.get("text", ""), need(row, "label", f"a line of {path}") != "no")
            for row in read_jsonl(path)
        ]
        own = ids.get(category, []) if ids else range(first, first + len(labels))
        if len(own) != len(labels):
            raise ValueError(
                f"{path} has {len(labels)} labels for {len(own)} questions of {_QUESTIONS}: it is of another version; "
                f"fetch it from {_LABELS}"
            )
        truth |= dict(zip(map(str, own), labels, strict=True))
    return truth


def truth_from_tables(tables: Tables) -> dict[str, Label]:
    """The hub's labels by question id."""
    truth = {}
    for category, first in _FIRST_IDS.items():
        texts, answers = (tables[category].column(name) for name in ("question", "answer"))
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True), start=first):
            truth[str(number)] = Label(category, text, answer.lower().strip() != "no")
    return truth


def says_yes(text: str) -> bool:
    """How an answer is read: no if the part before the first full stop has No, no or not as a word, else yes.

    Source: LLaVA's ``eval_pope.py``.
    """
    words = text.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(answers: Sequence[Answer], truth: Mapping[str, Label], judge: object = None) -> Score:
    """The mean of the categories' F1, in percent.

    A category's F1 is 0 where the official tool divides by zero (no right yes); one without any answer does not count.
    Where an image could not be read, the answer is the wrong one, whatever the right one is.

    Raises:
        ValueError: there are no answers, or they are to other questions than the labels.
    """
    matched = match(answers, truth)
    known = [(matched.answers[name], label) for name, label in truth.items() if name in matched.answers]
    categories = {}
    for category in _FIRST_IDS:
        own = [(answer, label) for answer, label in known if label.category == category]
        if own:
            categories[category] = {
                **_confusion([_read(answer, label) for answer, label in own]),
                "other_questions": _count_other_questions(own),
            }
    parts = {category: figures["f1"] for category, figures in categories.items()}
    pooled = _confusion([_read(answer, label) for answer, label in known])
    return Score(
        metric="mean F1 of adversarial, popular and random, in percent",
        score=statistics.fmean(parts.values()),
        details={
            "categories": categories,
            "accuracy": statistics.fmean(figures["accuracy"] for figures in categories.values()),
            "pooled_f1": pooled["f1"],
            **matched.counts,
        },
        parts=parts,
    )


def _read(answer: Answer, label: Label) -> tuple[bool, bool]:
    return (not label.yes if unreadable(answer) else says_yes(answer.text)), label.yes


def _confusion(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Counts, and figures in percent, of (answered yes, is yes)."""
    count = {pair: pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True))}
    right, wrong, denied, missed = count.values()
    precision = right / (right + wrong) if right else 0.0
    recall = right / (right + missed) if right else 0.0
    return {
        "f1": 100 * (2 * precision * recall / (precision + recall)) if right else 0.0,
        "accuracy": 100 * ((right + denied) / len(pairs)),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "yes_ratio": 100 * ((right + wrong) / len(pairs)),
        "true_positives": right,
        "false_positives": wrong,
        "true_negatives": denied,
        "false_negatives": missed,
        "questions": len(pairs),
    }


def _count_other_questions(pairs: Sequence[tuple[Answer, Label]]) -> int:
    """How many answers are to another question than their label, as their prompts say; refused if most are."""
    asked = [(answer.prompt.partition("\n")[0].strip(), label.question.strip()) for answer, label in pairs]
    others = [(prompt, question) for prompt, question in asked if prompt and question and prompt != question]
    if 2 * len(others) > len(pairs):
        prompt, question = others[0]
        raise ValueError(
            f"{len(others)} of {len(pairs)} answers in the category {pairs[0][1].category} are to other questions than "
            f"the labels ({prompt!r} is not {question!r}): score them with the labels of {_LABELS}, or, if the hub's "
            "questions were asked, with the hub's data"
        )
    return len(others)


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    summary="is such an object in the image? mean F1 of three kinds of questions; 8910",
    folder="pope",
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File("val2014/", "http://images.cocodataset.org/zips/val2014.zip, unpacked", "run"),
        File("coco/", f"the three coco_pope_*.json of {_LABELS}", "score"),
    ),
    tables={category: Table("lmms-lab/POPE", category, "Full") for category in _FIRST_IDS},
    max_new_tokens=128,
    from_folder=from_folder,
    from_tables=from_tables,
    truth_from_folder=truth_from_folder,
    truth_from_tables=truth_from_tables,
    score=score,
)

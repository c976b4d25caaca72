"""GQA testdev-balanced: 12,578 questions about 398 images, exact match.

Folder (LLaVA's): ``llava_gqa_testdev_balanced.jsonl``, the images in ``data/images`` and the official questions in
``data``. Hub: lmms-lab/GQA, where questions and images are two configurations, joined by the image's id; the same
questions, each with LLaVA's instruction behind it.

An answer loses its full stops at the end and its capitals (LLaVA's ``convert_gqa_for_eval.py``), and is right where it
equals the one right answer (official ``eval.py``, which stops where answers are missing: here they count as wrong).
Questions that are not in the balanced set do not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, SHORT_ANSWER, read_questions
from ..reading.sources import need, read_json, refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table
from ..scoring.matching import match, percent

_QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
_OFFICIAL = "testdev_balanced_questions.json"
_TYPES = ("structural", "semantic")


@dataclass(frozen=True)
class Gold:
    """What is right.

    Attributes:
        answer: in lower case.
        types: of the question, ``structural`` and ``semantic``; empty where the data has none.
    """

    answer: str
    types: Mapping[str, str] = field(default_factory=dict)


def from_folder(folder: Path) -> list[Question]:
    """Questions of LLaVA's file."""
    return read_questions(folder / _QUESTIONS, folder / "data" / "images")


def from_tables(tables: Tables) -> list[Question]:
    """Questions of the hub's tables, in their order.

    Raises:
        ValueError: a question is about an image that is not there.
    """
    rows, images = tables["questions"], tables["images"]
    index = {name: number for number, name in enumerate(images.column("id"))}
    names, texts, about = (rows.column(name) for name in ("id", "question", "imageId"))
    refuse_repeated(names, rows.name)
    if missing := [image for image in about if image not in index]:
        raise ValueError(f"{images.name} has no image {missing[0]!r}, which {rows.name} asks about: fetch both again")
    pictures = {image: images.picture(index[image]) for image in dict.fromkeys(about)}
    return [
        Question(name, text + SHORT_ANSWER, (pictures[image],))
        for name, text, image in zip(names, texts, about, strict=True)
    ]


def truth_from_folder(folder: Path) -> dict[str, Gold]:
    """Right answers by question id, from the official file in ``data`` (or as its zip unpacks, in a folder)."""
    places = ("data", "", "*", "*/*")
    found = (path for place in places for path in sorted(folder.glob(f"{place}/{_OFFICIAL}".lstrip("/"))))
    path = next(found, folder / "data" / _OFFICIAL)
    return {
        str(name): _gold(row, f"question {name} of {path}")
        for name, row in read_json(path).items()
        if row.get("isBalanced", True)
    }


def truth_from_tables(tables: Tables) -> dict[str, Gold]:
    """Right answers by question id; the table holds the balanced set only."""
    rows = tables["questions"]
    return {str(need(row, "id", rows.name)): _gold(row, f"a row of {rows.name}") for row in rows}


def _gold(row: Mapping[str, Any], where: str) -> Gold:
    types = row.get("types") or {}
    return Gold(need(row, "answer", where), {name: types[name] for name in _TYPES if types.get(name)})


def _prediction(answer: Answer) -> str:
    return answer.text.rstrip(".").lower()


def score(answers: Sequence[Answer], truth: Mapping[str, Gold], judge: object = None) -> Score:
    """Percent of the balanced questions that are answered right, as the official ``eval.py`` prints it.

    The details have its further lines: binary and open questions (open are those of structural type ``query``), and
    the accuracy by structural and semantic type, where the data tells types.
    """
    matched = match(answers, truth)
    points = {
        name: float(name in matched.answers and _prediction(matched.answers[name]) == gold.answer)
        for name, gold in truth.items()
    }
    groups: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ("binary/open", *_TYPES)}
    for name, gold in truth.items():
        for kind, value in gold.types.items():
            groups[kind][value].append(points[name])
        if structural := gold.types.get("structural"):
            groups["binary/open"]["open" if structural == "query" else "binary"].append(points[name])
    by_type = {
        group: {value: {"accuracy": percent(own), "questions": len(own)} for value, own in sorted(values.items())}
        for group, values in groups.items()
        if values
    }
    parts = {value: of["accuracy"] for value, of in by_type.get("binary/open", {}).items()}
    return Score(
        "exact match, %", percent(points.values()), {**matched.counts, **by_type}, parts, matched.in_order(points)
    )


BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    summary="12,578 questions about 398 images, testdev-balanced (exact match)",
    folder="gqa",
    max_new_tokens=128,
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File("data/images/", "images.zip of https://cs.stanford.edu/people/dorarad/gqa/download.html", "run"),
        File(
            f"data/{_OFFICIAL}", "questions1.2.zip of https://cs.stanford.edu/people/dorarad/gqa/download.html", "score"
        ),
    ),
    tables={
        "questions": Table("lmms-lab/GQA", "testdev", "testdev_balanced_instructions"),
        "images": Table("lmms-lab/GQA", "testdev", "testdev_balanced_images"),
    },
    from_folder=from_folder,
    from_tables=from_tables,
    truth_from_folder=truth_from_folder,
    truth_from_tables=truth_from_tables,
    score=score,
    missing="count as wrong",
)

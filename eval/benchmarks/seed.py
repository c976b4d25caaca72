"""SEED-Bench: questions with four options about images (types 1 to 9) and videos (types 10 to 12).

Data: LLaVA's folder has 14,233 questions about images and 5,009 about videos, of which it shows the middle frame.
The hub's data have fewer videos (3,757), and eight frames of each instead of that one: from there only the questions
about images are asked (SEED-I), so that the headline is over these.
Prompt: question, options, and LLaVA's instruction for a letter.
Metric: the share of answers that are the right letter and nothing else, over all questions; images and videos apart
in ``parts``, since papers report either (LLaVA-1.5: all; LLaVA-NeXT: images).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, LETTER, listed, read_questions
from ..reading.sources import need, read_json, refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table
from ..scoring.matching import match, percent, percent_by

if TYPE_CHECKING:
    from ..scoring.judge import Judge

_QUESTIONS = "llava-seed-bench.jsonl"
_TRUTH = "SEED-Bench.json"
_OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")


@dataclass(frozen=True)
class Gold:
    """What an answer is compared with: a letter; the question's kind (``image`` or ``video``) and the type's name."""

    answer: str
    kind: str
    type: str


def questions(folder: Path) -> list[Question]:
    """The questions of LLaVA's file, in its order."""
    return read_questions(folder / _QUESTIONS, folder)


def questions_of_tables(tables: Tables) -> list[Question]:
    """The hub's questions about images, in the order of its rows."""
    rows = tables["test"]
    asked = []
    for index, row in enumerate(rows.without("image")):
        where = f"{rows.name} row {index}"
        name, text, kind = (need(row, field, where) for field in ("question_id", "question", "data_type"))
        if kind != "image":
            continue
        options = [need(row, option, where) for option in _OPTIONS]
        asked.append(Question(name, f"{listed(text, options)}\n{LETTER}", (rows.picture(index),), _type_name(row)))
    refuse_repeated((str(question.id) for question in asked), rows.name)
    return asked


def _type_name(row: Mapping[str, Any]) -> str:
    return f"type {row.get('question_type_id')}"


def truth(folder: Path) -> dict[str, Gold]:
    """The right letters, from ``SEED-Bench.json``."""
    path = folder / _TRUTH
    content = read_json(path)
    names = {number: name for name, number in need(content, "question_type", str(path)).items()}
    gold = {}
    records = need(content, "questions", str(path))
    for number, row in enumerate(records):
        name, answer, kind, type_ = (
            need(row, field, f"question {number} of {path}")
            for field in ("question_id", "answer", "data_type", "question_type_id")
        )
        gold[str(name)] = Gold(answer, kind, names.get(type_, f"type {type_}"))
    refuse_repeated((str(row["question_id"]) for row in records), str(path))
    return gold


def truth_of_tables(tables: Tables) -> dict[str, Gold]:
    """The right letters of the hub's questions about images."""
    rows = tables["test"]
    gold = {}
    for index, row in enumerate(rows.without("image")):
        name, answer, kind = (
            need(row, field, f"{rows.name} row {index}") for field in ("question_id", "answer", "data_type")
        )
        if kind == "image":
            gold[str(name)] = Gold(answer, kind, _type_name(row))
    return gold


def score(answers: Sequence[Answer], truth: Mapping[str, Gold], judge: Judge | None = None) -> Score:
    """Accuracy over all questions, in percent, as LLaVA's ``convert_seed_for_submission.py`` prints it.

    A question without an answer counts as wrong; so does ``A.`` for ``A``.

    Raises:
        ValueError: no answer is to a question here.
    """
    matched = match(answers, truth)
    given = {name: answer.text for name, answer in matched.answers.items()}
    right = {name: float(given.get(name) == gold.answer) for name, gold in truth.items()}
    everything = percent(right.values())
    kinds = percent_by((truth[name].kind, point) for name, point in right.items())
    parts = {kind: kinds[kind] for kind in ("image", "video") if kind in kinds} | {"all": everything}
    types = percent_by((gold.type, right[name]) for name, gold in truth.items())
    details = {
        **parts,
        "types": types,
        "image_questions": sum(gold.kind == "image" for gold in truth.values()),
        "video_questions": sum(gold.kind == "video" for gold in truth.values()),
        "correct": int(sum(right.values())),
        "not_letters": sum(text not in {"A", "B", "C", "D"} for text in given.values()),
        **matched.counts,
    }
    return Score("accuracy", everything, details, parts, matched.in_order(right))


_SEED = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"

BENCHMARK = Benchmark(
    name="seed",
    title="SEED",
    summary="images and videos' middle frames, four options (accuracy; 19,242 questions, 14,233 of them about images)",
    folder="seed_bench",
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File("SEED-Bench-image/", f"{_SEED}: unpack SEED-Bench-image.zip", "run"),
        File(
            "SEED-Bench-video-image/",
            f"the middle frame of each video of {_SEED}, as LLaVA's scripts/extract_video_frames.py takes it",
            "run",
        ),
        File(_TRUTH, f"{_SEED}: the first version in its history; today's has fewer questions about videos", "score"),
    ),
    tables={"test": Table("lmms-lab/SEED-Bench", "test")},
    max_new_tokens=128,
    from_folder=questions,
    from_tables=questions_of_tables,
    truth_from_folder=truth,
    truth_from_tables=truth_of_tables,
    score=score,
    missing="count as wrong",
)

"""VQAv2: test-dev, which only EvalAI's server scores (challenge 830), or the validation set, scored here.

Folder (LLaVA's): the 107,394 questions of test-dev and the images of test2015. The submission has all 447,793
questions of test2015, with an empty answer where there is none. Answers to validation questions are scored where the
official ``v2_mscoco_val2014_annotations.json`` lies beside them.
Hub: lmms-lab/VQAv2, here its validation split (214,354 questions), which has people's answers: scored offline, and the
submission has all of its questions. Its number is some two points below that of test-dev: never compare the two.

Answers are normalised as LLaVA does before it uploads them (``convert_vqav2_for_submission.py``), then compared as the
server does (the official ``vqaEval.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, SHORT_ANSWER, read_questions
from ..reading.sources import need, read_json, read_jsonl, refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table
from ..scoring.matching import match
from ..scoring.vqa import Annotation, normalise, write_submission
from ..scoring.vqa_server import Server, Truth, annotation_of, score_validation

_QUESTIONS = "llava_vqav2_mscoco_test-dev2015.jsonl"
_UPLOAD = "llava_vqav2_mscoco_test2015.jsonl"
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


_SERVER = Server(
    "VQAv2's test-dev",
    "vqav2_submission.json",
    "https://eval.ai/web/challenges/challenge-page/830 (phase test-dev)",
    _ANNOTATIONS,
)


def from_folder(folder: Path) -> list[Question]:
    """Questions of test-dev."""
    return read_questions(folder / _QUESTIONS, folder / "test2015")


def from_tables(tables: Tables) -> list[Question]:
    """Questions of the validation set; those about one COCO image share it."""
    rows = tables["validation"]
    ids, texts, images = (rows.column(name) for name in ("question_id", "question", "image_id"))
    refuse_repeated(ids, rows.name)
    return [
        Question(name, text + SHORT_ANSWER, (replace(rows.picture(index), key=f"{rows.name} image {image}"),))
        for index, (name, text, image) in enumerate(zip(ids, texts, images, strict=True))
    ]


def truth_from_folder(folder: Path) -> Truth:
    """The ids of test2015, and the annotations of the validation set where they are there.

    Raises:
        FileNotFoundError: neither is there.
    """
    upload, annotations = folder / _UPLOAD, folder / _ANNOTATIONS
    found = {}
    if annotations.is_file():
        rows = need(read_json(annotations), "annotations", str(annotations))
        found = dict(_annotation(row, str(annotations)) for row in rows)
        if not upload.is_file():
            return Truth([], found)
    return Truth([need(row, "question_id", str(upload)) for row in read_jsonl(upload)], found)


def truth_from_tables(tables: Tables) -> Truth:
    """People's answers to the validation set."""
    rows = tables["validation"].without("image")
    found = dict(_annotation(row, rows.name) for row in rows)
    return Truth([], found)


def _annotation(row: Mapping, where: str) -> tuple[int, Annotation]:
    name = need(row, "question_id", where)
    return name, annotation_of(row, f"question {name} of {where}")


def score(answers: Sequence[Answer], truth: Truth, judge: object = None) -> Score:
    """VQA accuracy of answers to the validation set, in percent, with that of each type of answer.

    Raises:
        ScoredByServerError: they are answers to test-dev.
    """
    return score_validation(answers, truth, _SERVER)


def submit(answers: Sequence[Answer], truth: Truth, folder: Path) -> Path:
    """Write the results file of the VQA challenge: every question, with "" where there is no answer."""
    ids = truth.annotations if truth.annotated(answers) else truth.test
    given = match(answers, ids).answers
    entries = [{"question_id": name, "answer": normalise(given[name].text) if name in given else ""} for name in ids]
    return write_submission(entries, folder / _SERVER.file)


BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2",
    summary="107,394 questions of test-dev (VQA accuracy by EvalAI's server); on the hub, 214,354 of validation",
    folder="vqav2",
    max_new_tokens=128,
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File(_UPLOAD, EVAL_ZIP, "both"),
        File("test2015/", "http://images.cocodataset.org/zips/test2015.zip", "run"),
    ),
    tables={"validation": Table("lmms-lab/VQAv2", "validation")},
    from_folder=from_folder,
    from_tables=from_tables,
    truth_from_folder=truth_from_folder,
    truth_from_tables=truth_from_tables,
    score=score,
    submit=submit,
    missing="count as empty answers",
    asked=lambda answers, truth: truth.asked(answers),
)

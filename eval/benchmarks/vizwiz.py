"""VizWiz: questions that blind people asked about their photographs; EvalAI's server scores the 8,000 of the test set.

Folder (LLaVA's): the questions of the test set and its images; the submission has an answer for every image. Answers
to validation questions are scored where the official ``val.json`` lies beside them; their question_id is the image's
name, as on the hub.
Hub: lmms-lab/VizWiz-VQA, here its val split (4,319 questions), which has people's answers: scored offline. There, as in
LLaVA's file, a question has one capital, its first letter.

Answers are normalised as LLaVA does before it uploads them (``convert_vizwiz_for_submission.py``). The validation set
is scored with them as the VQA server would; that VizWiz's server does the same is not verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, SHORT_ANSWER, read_questions
from ..reading.sources import need, read_json, read_jsonl, refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table
from ..scoring.matching import match
from ..scoring.vqa import Annotation, normalise, ten, write_submission
from ..scoring.vqa_server import Server, Truth, annotation_of, score_validation

_QUESTIONS = "llava_test.jsonl"
_ANNOTATIONS = "val.json"
_INSTRUCTION = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER


_SERVER = Server(
    "VizWiz's test set",
    "vizwiz_submission.json",
    "the challenge that https://vizwiz.org/tasks-and-datasets/vqa names",
    _ANNOTATIONS,
)


def from_folder(folder: Path) -> list[Question]:
    """Questions of the test set."""
    return read_questions(folder / _QUESTIONS, folder / "test")


def from_tables(tables: Tables) -> list[Question]:
    """Questions of the validation set."""
    rows = tables["val"]
    ids, texts = rows.column("question_id"), rows.column("question")
    refuse_repeated(ids, rows.name)
    return [
        Question(name, text.capitalize() + _INSTRUCTION, (rows.picture(index),))
        for index, (name, text) in enumerate(zip(ids, texts, strict=True))
    ]


def truth_from_folder(folder: Path) -> Truth:
    """The images of the test set by question id, and people's answers to the validation set where they are there.

    Those are by the image's name without ``.jpg``.

    Raises:
        FileNotFoundError: neither is there.
    """
    questions, annotations = folder / _QUESTIONS, folder / _ANNOTATIONS
    found = {}
    if annotations.is_file():
        for row in read_json(annotations):
            name = _stem(need(row, "image", str(annotations)))
            found[name] = annotation_of(row, f"{name} of {annotations}")
        if not questions.is_file():
            return Truth({}, found)
    where = str(questions)
    return Truth({need(row, "question_id", where): need(row, "image", where) for row in read_jsonl(questions)}, found)


def truth_from_tables(tables: Tables) -> Truth:
    """People's answers to the validation set."""
    rows = tables["val"].without("image")
    found = {}
    for row in rows:
        name = _stem(need(row, "question_id", rows.name))
        where = f"{name} of {rows.name}"
        found[name] = Annotation(ten(need(row, "answers", where), where), row.get("category") or "other")
    return Truth({}, found)


def _stem(name: int | str) -> str:
    return str(name).removesuffix(".jpg")


def _name(answer: Answer) -> str:
    return _stem(answer.question_id)


def score(answers: Sequence[Answer], truth: Truth, judge: object = None) -> Score:
    """VQA accuracy of answers to the validation set, in percent, with that of each type of answer.

    Raises:
        ScoredByServerError: they are answers to the test set.
    """
    return score_validation(answers, truth, _SERVER, _name)


def submit(answers: Sequence[Answer], truth: Truth, folder: Path) -> Path:
    """Write the results file of the VizWiz challenge.

    Raises:
        ValueError: an answer is missing; LLaVA's converter, too, refuses that.
    """
    if truth.annotated(answers, _name):
        images = {name: f"{name}.jpg" for name in truth.annotations}
        given = match(answers, images, _name).answers
    else:
        images = truth.test
        given = match(answers, images).answers
    if missing := [image for name, image in images.items() if name not in given]:
        raise ValueError(
            f"{len(missing)} of {len(images)} images have no answer (the first is {missing[0]}), and VizWiz's server "
            "wants all: answer the rest, then submit"
        )
    entries = [{"image": image, "answer": normalise(given[name].text)} for name, image in images.items()]
    return write_submission(entries, folder / _SERVER.file)


BENCHMARK = Benchmark(
    name="vizwiz",
    title="VizWiz",
    summary="8,000 questions of blind people (VQA accuracy by EvalAI's server); on the hub, 4,319 of validation",
    folder="vizwiz",
    max_new_tokens=128,
    files=(
        File(_QUESTIONS, EVAL_ZIP),
        File("test/", "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip", "run"),
    ),
    tables={"val": Table("lmms-lab/VizWiz-VQA", "val")},
    from_folder=from_folder,
    from_tables=from_tables,
    truth_from_folder=truth_from_folder,
    truth_from_tables=truth_from_tables,
    score=score,
    submit=submit,
    missing="count as empty answers",
    asked=lambda answers, truth: truth.asked(answers, _name),
)

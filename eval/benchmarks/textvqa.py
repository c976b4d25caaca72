"""TextVQA validation: 5,000 questions about text in images, asked with OCR tokens as LLaVA does, VQA accuracy.

Folder (LLaVA's): ``llava_textvqa_val_v051_ocr.jsonl``, whose prompts hold Rosetta's OCR tokens, the official
``TextVQA_0.5.1_val.json`` and the images of ``train_images``. The question_id is the image's, and is not unique:
answers are joined with the right ones by image and question, which is taken from the prompt in the answers file.
Hub: lmms-lab/textvqa, validation split. The prompt is built from its ``ocr_tokens``; that these are LLaVA's, token for
token, is not verified. (Without OCR tokens, as lmms-eval asks by default, the number is many points lower.)

Answers of both sides are normalised in full. Source: LLaVA's ``eval_textvqa.py``, which averages over the answers that
are there; those that it would stop at are counted as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, SHORT_ANSWER, read_questions
from ..reading.sources import need, read_json
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table
from ..scoring.matching import asked, match, percent, unreadable
from ..scoring.vqa import ten, textvqa_accuracy

_QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
_ANNOTATIONS = "TextVQA_0.5.1_val.json"
_OCR = "Reference OCR token:"

Key = tuple[str, str]  # the image's id and the question in lower case
Truth = Mapping[Key, tuple[str, ...]]


def from_folder(folder: Path) -> list[Question]:
    """Questions of LLaVA's file."""
    return read_questions(folder / _QUESTIONS, folder / "train_images", repeated=True)


def from_tables(tables: Tables) -> list[Question]:
    """Questions of the hub's table, with its OCR tokens; those about one image share it.

    As in LLaVA's file, a question has one capital, its first letter.
    """
    rows = tables["validation"]
    columns = (rows.column(name) for name in ("image_id", "question", "ocr_tokens"))
    return [
        Question(
            image,
            f"{question.capitalize()}\n{_OCR} {', '.join(tokens)}{SHORT_ANSWER}",
            (replace(rows.picture(index), key=f"{rows.name} image {image}"),),
        )
        for index, (image, question, tokens) in enumerate(zip(*columns, strict=True))
    ]


def truth_from_folder(folder: Path) -> Truth:
    """Ten people's answers by image and question; of the same question twice, the last counts, as in LLaVA's script."""
    path = folder / _ANNOTATIONS
    return dict(_annotation(row, str(path)) for row in need(read_json(path), "data", str(path)))


def truth_from_tables(tables: Tables) -> Truth:
    """The same of the hub's table."""
    rows = tables["validation"].without("image")
    return dict(_annotation(row, rows.name) for row in rows)


def _annotation(row: Mapping, where: str) -> tuple[Key, tuple[str, ...]]:
    key = (need(row, "image_id", where), need(row, "question", where).lower())
    return key, ten(need(row, "answers", where), f"{key[1]!r} about image {key[0]} of {where}")


def _key(answer: Answer) -> Key:
    return str(answer.question_id), _question(answer.prompt).lower()


def _question(prompt: str) -> str:
    """The question in a prompt of one of the three forms that LLaVA's script knows; "" in others."""
    if prompt.startswith("OCR tokens: "):
        found = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found[1] if found else ""
    lines = prompt.split("\n")
    if len(lines) == 3 and f"{_OCR} " in prompt:
        return lines[1] if prompt.startswith(_OCR) else lines[0]
    return lines[0] if len(lines) == 2 else ""


def score(answers: Sequence[Answer], truth: Truth, judge: object = None) -> Score:
    """VQA accuracy in percent, over the answers that are there, as LLaVA's script prints it."""
    matched = match(answers, truth, _key)
    points = [
        0.0 if unreadable(answer) else textvqa_accuracy(answer.text, truth[key])
        for key, answer in zip(matched.ids, answers, strict=True)
        if key is not None
    ]
    whole = len(points) == len(answers)
    return Score("VQA accuracy, %", percent(points), matched.counts, points=points if whole else None)


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    summary="5,000 validation questions about text in images, asked with OCR tokens (VQA accuracy)",
    folder="textvqa",
    max_new_tokens=128,
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File(_ANNOTATIONS, "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json", "score"),
        File("train_images/", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "run"),
    ),
    tables={"validation": Table("lmms-lab/textvqa", "validation")},
    from_folder=from_folder,
    from_tables=from_tables,
    truth_from_folder=truth_from_folder,
    truth_from_tables=truth_from_tables,
    score=score,
    asked=partial(asked, name=_key),
)

"""LLaVA's question files, and how its scripts ask: the instructions that questions end in, and the lines of options."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

from ..records import Question
from .sources import need, picture, read_jsonl, read_once, refuse_repeated

EVAL_ZIP = (
    "LLaVA's eval.zip (https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy/view?usp=sharing): unpack it "
    "in playground/data/eval"
)
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@read_once
def read_questions(path: Path, images: Path, repeated: bool = False) -> list[Question]:
    """The questions of a file with a json object on each line: question_id, image, text, and mostly category.

    Args:
        path: the file.
        images: folder of the images.
        repeated: an id may come more than once, as it is that of the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is damaged or has not all that, or an id comes twice.
    """
    questions = []
    for number, row in enumerate(read_jsonl(path), start=1):
        name, image, text = (need(row, field, f"line {number} of {path}") for field in ("question_id", "image", "text"))
        questions.append(Question(name, text, (picture(images / image),), row.get("category") or "default"))
    if not repeated:
        refuse_repeated((str(question.id) for question in questions), str(path))
    return questions


def lettered(options: Iterable[str]) -> dict[str, str]:
    """Options by their letters, from A."""
    return dict(zip(string.ascii_uppercase, options, strict=False))


def listed(question: str, options: Iterable[str]) -> str:
    """A question and its options, one on each line, as ``A. text``. Source: LLaVA's question files and scripts."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in lettered(options).items())])

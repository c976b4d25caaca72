"""Scenes: questions with one-word answers about synthetic images, the embedded model's own benchmark.

Data: one parquet file with a row per question (``python -m playground.scenes test`` writes it; ``--data`` may name it
or its folder), in the columns question_id, image_id, image {bytes, path}, type, question and answer. Prompt: the
question as it is. Score: exact match, but for case, blanks around and a full stop; the mean over all questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

from ..benchmark import Benchmark
from ..reading.sources import picture_of, read_once, refuse_repeated
from ..records import Answer, File, Question, Score
from ..scoring.judge import Judge
from ..scoring.matching import match, percent, percent_by

_COLUMNS = ["question_id", "image_id", "image", "type", "question", "answer"]
_TYPES = ("presence", "color", "shape", "count", "reading", "position", "background")
_FILE = "test.parquet"
_HOME = "playground/data/eval/scenes/test.parquet"


def _rows(folder: Path) -> list[dict[str, Any]]:
    return _read(folder if folder.suffix == ".parquet" else folder / _FILE)


@read_once
def _read(path: Path) -> list[dict[str, Any]]:
    # Not through `datasets`: importing that takes longer than reading the file.
    import pyarrow as pa  # noqa: PLC0415 - of the extra `eval`; listing benchmarks does without
    import pyarrow.parquet as pq  # noqa: PLC0415

    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: give one by --data. A clone of the repository has {_HOME}, and makes others "
            "with `python -m playground.scenes test`"
        )
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: make it again ({error})") from error
    if missing := [name for name in _COLUMNS if rows and name not in rows[0]]:
        raise ValueError(f"{path} has no column {', '.join(missing)}: it is not a scenes test set")
    if not rows:
        raise ValueError(f"{path} has no questions: make it again")
    refuse_repeated((row["question_id"] for row in rows), str(path))
    if unknown := {row["type"] for row in rows} - {*_TYPES}:
        raise ValueError(f"{path} has a question of type {unknown.pop()!r}: known are {', '.join(_TYPES)}")
    return rows


def questions(folder: Path) -> list[Question]:
    """The questions in a folder's file."""
    images = {}
    for row in (rows := _rows(folder)):
        images.setdefault(row["image_id"], picture_of(row["image"], f"image {row['image_id']} of {folder}"))
    return [Question(row["question_id"], row["question"], (images[row["image_id"]],), row["type"]) for row in rows]


def truth(folder: Path) -> dict[int, tuple[str, str]]:
    """Type and answer of each question, by its id."""
    return {row["question_id"]: (row["type"], row["answer"]) for row in _rows(folder)}


def is_right(text: str, answer: str) -> bool:
    """Whether a model said the right word."""
    return text.strip().removesuffix(".").casefold() == answer.casefold()


def score(answers: Sequence[Answer], truth: Mapping[int, tuple[str, str]], judge: Judge | None = None) -> Score:
    """The share of questions with the right word, of those that were answered, in percent.

    Raises:
        ValueError: no answer is to a question here.
    """
    matched = match(answers, truth)
    known = [(truth[name], answer) for name, answer in zip(matched.ids, answers, strict=True) if name is not None]
    points = [float(is_right(answer.text, right)) for (_, right), answer in known]
    found = percent_by((type_, point) for ((type_, _), _), point in zip(known, points, strict=True))
    parts = {name: found[name] for name in _TYPES if name in found}
    details = {**matched.counts, "answered": len(known), "by_type": parts}
    return Score("exact match, %", percent(points), details, parts, points)


def median_image(folder: Path, answers: Sequence[Answer]) -> bytes:
    """Choose the image to show of a test set: the first whose questions were answered with the median accuracy.

    Args:
        folder: of the test set, or its file.
        answers: a run's; images without any are left out.

    Returns:
        the image's JPEG file; of an even number of accuracies the lower middle one counts.

    Raises:
        ValueError: no answer is to a question here.
    """
    said = {answer.question_id: answer.text for answer in answers}
    points: dict[bytes, list[bool]] = {}
    for row in _rows(folder):
        if (text := said.get(row["question_id"])) is not None:
            points.setdefault(row["image"]["bytes"], []).append(is_right(text, row["answer"]))
    if not points:
        raise ValueError(f"none of the {len(said)} answers is to a question in {folder}")
    accuracy = {image: fmean(right) for image, right in points.items()}
    median = median_low(accuracy.values())
    return next(image for image, value in accuracy.items() if value == median)


BENCHMARK = Benchmark(
    name="scenes",
    title="Scenes",
    summary="one-word questions about synthetic scenes (exact match)",
    folder="scenes",
    max_new_tokens=8,
    files=(File(_FILE, f"{_HOME} of the repository, or there by python -m playground.scenes test"),),
    from_folder=questions,
    truth_from_folder=truth,
    score=score,
)

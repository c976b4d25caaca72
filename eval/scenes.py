"""Scenes: questions with one-word answers about synthetic images, the embedded model's own benchmark.

Data: one parquet file with a row per question (``python -m playground.scenes test`` writes it), in the columns
question_id, image_id, image {bytes, path}, type, question and answer. Prompt: the question as it is. Score: exact
match, but for case, blanks around and a full stop.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from eval.benchmark import Benchmark, Sample

_COLUMNS = ["question_id", "image_id", "image", "type", "question", "answer"]
_CATEGORIES = ("presence", "color", "shape", "count", "reading", "position", "background")


def load(path: Path) -> list[Sample]:
    """Read the questions.

    Args:
        path: the parquet file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or holds something else.
    """
    # Not through `datasets`: importing that takes longer than reading the file.
    import pyarrow as pa  # noqa: PLC0415 - of the extra `eval`; listing benchmarks does without
    import pyarrow.parquet as pq  # noqa: PLC0415

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: make it with `python -m playground.scenes test`")
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: make it again ({error})") from error
    if missing := [name for name in _COLUMNS if rows and name not in rows[0]]:
        raise ValueError(f"{path} has no column {', '.join(missing)}: it is not a scenes test set")
    if not rows:
        raise ValueError(f"{path} has no questions: make it again")
    if repeated := [str(name) for name, count in Counter(row["question_id"] for row in rows).items() if count > 1]:
        raise ValueError(f"{path} has several questions with the question_id {', '.join(repeated[:3])}: make it again")
    images: dict[int, Image.Image] = {}
    samples = []
    for row in rows:
        if row["type"] not in _CATEGORIES:
            raise ValueError(f"{path} has a question of type {row['type']!r}: known are {', '.join(_CATEGORIES)}")
        if row["image_id"] not in images:
            images[row["image_id"]] = _decode(row["image"]["bytes"], f"image {row['image_id']} of {path}")
        image = images[row["image_id"]]
        samples.append(Sample(str(row["question_id"]), (image,), row["question"], row["answer"], row["type"]))
    return samples


def _decode(file: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(file)) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, TypeError) as error:
        raise ValueError(f"{name} cannot be read ({error}): make the file again") from error


def score(sample: Sample, text: str) -> float:
    """1 for the right word, else 0."""
    return float(text.strip().removesuffix(".").casefold() == sample.answer.casefold())


BENCHMARK = Benchmark(
    name="scenes",
    summary="one-word questions about synthetic scenes (exact match)",
    source=Path("playground/data/eval/scenes/test.parquet"),
    load=load,
    prompt=lambda sample: sample.question,
    score=score,
    categories=_CATEGORIES,
    max_new_tokens=8,
)

"""What a benchmark is: questions about images, how they are put to a model, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unique in its benchmark.
        images: RGB images, in the order of the prompt; questions about one image share the object, which is then
            prepared and encoded once.
        question: as the data has it.
        answer: the right one.
        category: which of the benchmark's categories it counts in.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    category: str


@dataclass(frozen=True)
class Benchmark:
    """Data, prompt and score, and nothing else.

    Attributes:
        name: how commands call it.
        summary: one line about it.
        source: file that the data comes from, relative to the repository's root.
        load: the questions in a file like ``source``; raises OSError or ValueError, with the cure.
        prompt: the user's turn for a question; ``<image>`` goes in front where it does not say where.
        score: 0 to 1 for a question and the model's text. The result is the mean, of each category and of all.
        categories: in the order of the table's columns.
        max_new_tokens: limit on an answer's length.
    """

    name: str
    summary: str
    source: Path
    load: Callable[[Path], list[Sample]]
    prompt: Callable[[Sample], str]
    score: Callable[[Sample, str], float]
    categories: tuple[str, ...]
    max_new_tokens: int

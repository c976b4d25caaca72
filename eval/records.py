"""What benchmarks and runs hand to each other: questions and their images, answers, scores, and where data lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Visual:
    """An image or a video that a question is about, opened when its turn comes.

    Attributes:
        key: the same for the same image: questions about it then share its visual tokens. A path, or a row's name.
        open: the RGB images that the model gets: one, or a video's frames (it takes ``count``, how many). Raises
            ValueError or OSError with its name.
        frames: of a video, how many of its frames these are; None: it is an image.
        path: the file, where it is one; it is looked for before any work starts.
        content: a checksum of the bytes, or of what they lie in, at little cost: it tells whether answers can stay.
            None: the file's, see :func:`eval.reading.fingerprint.checksum_of_image`.
    """

    key: str
    open: Callable[..., list[Image.Image]]
    frames: int | None = None
    path: Path | None = None
    content: Callable[[], str] | None = None


@dataclass(frozen=True)
class Question:
    """A question as it is put to the model.

    Attributes:
        id: ``question_id`` in the answers file, of the data's own type. Some benchmarks repeat it (MME, TextVQA).
        text: the user's turn with its instruction. Where it has no ``<image>``, one for each image goes in front.
        visuals: what it is about; empty for text only.
        category: of the benchmark's own categories.
        prompt: what the answers file says was asked, as LLaVA's scripts write it; None: the text.
        extra: further fields of its line in the answers file.
    """

    id: str | int
    text: str
    visuals: tuple[Visual, ...] = ()
    category: str = "default"
    prompt: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A line of an answers file.

    Attributes:
        question_id: of the question.
        text: the model's, without special tokens and blanks around.
        prompt: what the file says was asked.
        extra: its further fields.
    """

    question_id: str | int
    text: str
    prompt: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A result.

    Attributes:
        metric: what the score is, in words.
        score: the headline, as the official tool prints it (not rounded more than that).
        details: subtasks, splits, counts and failures, ready for JSON.
        parts: the columns of a table: name to score, in the headline's unit.
        points: 0 to 1 for each of what is counted (questions; MMBench's base questions), in the data's order, where
            the headline is 100 times their mean; standard errors come from it. None for other metrics.
    """

    metric: str
    score: float
    details: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    points: Sequence[float] | None = None


class UnscoredError(ValueError):
    """There is no score for these answers, though nothing is wrong with them. The message says why."""


class ScoredByServerError(UnscoredError):
    """The answers are to be scored by a server: there is no truth here. The message says where to send them."""


@dataclass(frozen=True)
class File:
    """Something that LLaVA's folder layout holds.

    Attributes:
        path: below the benchmark's folder; a directory ends in ``/``.
        source: where it comes from: a URL, and what to do with it.
        needed: to ``"run"`` (questions and images), to ``"score"``, or ``"both"``.
    """

    path: str
    source: str
    needed: str = "both"


@dataclass(frozen=True)
class Table:
    """Rows on the Hugging Face hub, for ``datasets.load_dataset(dataset, config, split=split)``."""

    dataset: str
    split: str
    config: str | None = None

"""Conversations of the page: what was asked under which setting, and what the two sides answered at what cost."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.demo.uploads import Upload
from llava.serve.turns import Turn
from visionzip import VisionZipConfig, unzip, visionzip
from visionzip.config import MergeRule, Positions


class StoppedError(Exception):
    """The user has stopped the answer."""


@dataclass(frozen=True)
class Setting:
    """What VisionZip is set to.

    Attributes:
        keep: tokens of each image, tile or frame, or their share of the patches.
        method: as in :func:`visionzip.visionzip`, like the next two.
        positions: None is the method's own.
        size_bias: None is the method's own.
        layer: None is the family's default, like the next two.
        merge: of VisionZip.
        seed: of methods that draw at random.
        split: (dominant, contextual), which holds where VisionZip keeps as many; None is VisionZip's usual split.
    """

    keep: int | float
    method: str = "visionzip"
    positions: Positions | None = None
    size_bias: bool | None = None
    layer: int | None = None
    merge: MergeRule | None = None
    seed: int | None = None
    split: tuple[int, int] | None = None

    def put_on(self, model: Any) -> None:
        """Zip a model with it.

        Raises:
            ValueError: they do not go together.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the page shows that nothing is compressed
            visionzip(
                unzip(model),
                **self._budget(),
                method=self.method,
                positions=self.positions,
                size_bias=self.size_bias,
                layer=self.layer,
                merge=self.merge,
                seed=self.seed,
            )

    def _budget(self) -> dict[str, Any]:
        if self.split and self.method == "visionzip" and self.keep == sum(self.split):
            return {"dominant": self.split[0], "contextual": self.split[1]}
        return {"keep": self.keep}

    def tokens(self, patches: int) -> int:
        """Tokens of an image of N patches."""
        return min(patches, VisionZipConfig(keep=self.keep).tokens(patches))

    def __str__(self) -> str:
        budget = f"{self.keep} tokens" if isinstance(self.keep, int) else f"{self.keep:.0%} of the patches"
        positions = f", {self.positions} positions" if self.positions else ""
        bias = "" if self.size_bias is None else f", size bias {'on' if self.size_bias else 'off'}"
        return f"{self.method}, {budget}{positions}{bias}"


@dataclass
class Picture:
    """An image of a conversation.

    Attributes:
        upload: the image.
        picks: for each tile the patches that were picked by hand; None leaves them to the method.
    """

    upload: Upload
    picks: tuple[tuple[int, ...], ...] | None = None


@dataclass
class Answer:
    """One side's answer and what it cost.

    Attributes:
        turn: as :class:`ChatSession` has it.
        visual_tokens: of all images of the conversation so far.
        first_token: seconds from the question to the first token, with images that had to be encoded.
    """

    turn: Turn
    visual_tokens: int
    first_token: float

    @property
    def speed(self) -> float | None:
        """Tokens per second behind the first; None where there is only that one."""
        turn = self.turn
        return (turn.new_tokens - 1) / turn.decode_seconds if turn.new_tokens > 1 and turn.decode_seconds else None


@dataclass
class Exchange:
    """A question and its answers, which are there one after the other."""

    number: int
    question: str
    pictures: list[Picture]
    setting: str
    partial: dict[str, str] = field(default_factory=dict)  # text so far
    answers: dict[str, Answer] = field(default_factory=dict)


class Talk:
    """One visitor's conversation: images, turns, and a :class:`ChatSession` for each side."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._ticket, self._stopped = 0, -1
        self.shown: dict[str, Any] = {}  # what each component of the page has
        self._clear()

    def _clear(self) -> None:
        self.pictures: list[Picture] = []
        self.waiting: list[Picture] = []  # for the next question
        self.selected = 0
        self.exchanges: list[Exchange] = []
        self.sides: dict[str, Any] = {}  # a ChatSession each
        self.seen_pick = 0

    def begin(self) -> None:
        """A question is on its way: what stopped an earlier one does not stop it."""
        self._ticket += 1

    def stop(self) -> None:
        """Stop what is running or waiting."""
        self._stopped = self._ticket

    def stopped(self) -> Callable[[], bool]:
        """Whether what begins now has been stopped."""
        mine = self._ticket
        return lambda: self._stopped >= mine

    def add(self, uploads: Sequence[Upload]) -> None:
        """Put images to the next question."""
        new = [Picture(upload) for upload in uploads]
        self.pictures += new
        self.waiting += new
        if new:
            self.selected = len(self.pictures) - 1

    def forget(self) -> None:
        """Begin anew, without any image."""
        self.stop()
        self.begin()
        self._clear()

    def next_number(self) -> int:
        """Of an exchange."""
        return next(self._numbers)

    def drop_caches(self) -> None:
        """Give memory back; the next turn fills them again."""
        self.sides = {}

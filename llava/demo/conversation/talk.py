"""A conversation of the page: what was asked under which setting, and what the two sides answered at what cost."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.demo.conversation.setting import Setting
from llava.demo.uploads.images import Visual
from llava.demo.uploads.videos import Clip
from llava.serve.turns import Turn

Picks = tuple[tuple[int, ...], ...]
"""Patches picked by hand: of each tile of an image its numbers, row by row from 0."""
_PATIENCE = 5.0  # seconds


class StoppedError(Exception):
    """The user has stopped the answer."""


@dataclass
class Picture:
    """An image or a video of a conversation.

    Attributes:
        upload: what it is.
        picks: for each tile the patches that were picked by hand; None leaves them to the method.
    """

    upload: Visual
    picks: Picks | None = None


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
    """A question and its answers, which are there one after the other; or why a side has none."""

    number: int
    question: str
    pictures: list[Picture]
    setting: str
    partial: dict[str, str] = field(default_factory=dict)  # text so far
    answers: dict[str, Answer] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def frames(self) -> int | None:
        """Of all its videos; None without one, or with images beside them."""
        counts = [len(picture.upload.files) for picture in self.pictures if isinstance(picture.upload, Clip)]
        return sum(counts) if counts and len(counts) == len(self.pictures) else None

    def take_over(self, other: Exchange, slot: str) -> None:
        """What a side has said to the same question before."""
        for own, theirs in ((self.answers, other.answers), (self.refused, other.refused)):
            if slot in theirs:
                own[slot] = theirs[slot]


class Talk:
    """One visitor's conversation: images, turns, and a :class:`ChatSession` for each side."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._ticket, self._stopped = 0, -1
        self.shown: dict[str, Any] = {}  # what each component of the page has
        self.drawn = 0  # pictures since which the picks are dropped: one for the wrong picture does not count
        self.picked = 0  # number of the last pick, as the browser counts them
        self._heard = threading.Condition()
        self._clear()

    def _clear(self) -> None:
        self.pictures: list[Picture] = []
        self.waiting: list[Picture] = []  # for the next question
        self.selected = 0
        self.hint = ""  # what there is to see in the picture
        self.setting: Setting | None = None  # of the picture
        self.pairs = False  # whether the picture says what each patch attends to
        self.exchanges: list[Exchange] = []
        self.sides: dict[str, Any] = {}  # a ChatSession each
        self.leaving = False  # a new one is to begin

    def begin(self, number: int = 0) -> None:
        """A question's turn has come: what stopped earlier ones does not stop it.

        Args:
            number: of the question, as the browser counts them; 0 is the next one.
        """
        self.leaving = False
        self._ticket = number or self._ticket + 1

    def stop(self, number: int | None = None) -> None:
        """Stop the questions up to a number, whether they run, wait or are still to come; None is the last one's."""
        self._stopped = max(self._stopped, self._ticket if number is None else number)

    def stopped(self) -> Callable[[], bool]:
        """Whether what begins now has been stopped."""
        mine = self._ticket
        return lambda: self._stopped >= mine

    def note_pick(self, number: int) -> None:
        """A pick has come."""
        with self._heard:
            self.picked = max(self.picked, number)
            self._heard.notify_all()

    def await_pick(self, number: int) -> None:
        """Wait for a pick that was made before a question, but not for one that the network has lost."""
        with self._heard:
            self._heard.wait_for(lambda: self.picked >= number, _PATIENCE)

    def drop_picks(self) -> None:
        """Leave all pictures to the method; picks on their way come too late."""
        self.drawn += 1
        for picture in self.pictures:
            picture.picks = None

    def add(self, uploads: Sequence[Visual]) -> None:
        """Put images and videos to the next question."""
        new = [Picture(upload) for upload in uploads]
        self.pictures += new
        self.waiting += new
        self.hint = ""
        if new:
            self.selected = len(self.pictures) - 1

    def forget(self) -> None:
        """Begin anew, without any image."""
        self.stop()
        self.begin()
        self.drop_picks()
        self._clear()

    def next_number(self) -> int:
        """Of an exchange."""
        return next(self._numbers)

    def drop_caches(self) -> None:
        """Give memory back; the next turn fills them again."""
        self.sides = {}

"""What the page talks to: LLaVA's families with an image processor, and transformers' others with their own processor.

Both say what they keep of an image, and make one side of a conversation; the rest of the page knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from transformers.generation.streamers import BaseStreamer

from llava.demo.conversation.talk import Picks
from llava.serve.chat import Turn
from llava.video import Visual
from visionzip import VisionZipConfig, picked_tokens


class Side(Protocol):
    """One side of a conversation.

    Attributes:
        generate_kwargs: for ``generate``.
        picks: of each image of the conversation, in order, before the side is asked or takes a conversation up.
        is_stopped: whether the visitor has stopped it.
        holds: which turns it has in its cache, and under which setting; the desk's own note.
    """

    generate_kwargs: dict[str, Any]
    picks: list[Picks | None]
    is_stopped: Callable[[], bool]
    holds: Any

    @property
    def visual_tokens(self) -> int:
        """Of all images of the conversation."""

    def resume(self, turns: Sequence[tuple[str, Sequence[Visual], str]]) -> None:
        """Take up a conversation: questions, their images and videos, answers."""

    def ask(self, text: str, images: Sequence[Visual] = (), streamer: BaseStreamer | None = None) -> Turn:
        """Ask the next question."""


class PageModel(Protocol):
    """A model of the page.

    Attributes:
        model: it.
        tokenizer: its tokenizer.
        patches: of an image or tile, of which a budget is a number or a share; None where it depends on the image, so
            that a budget is a share.
        pairable: whether pictures can say what each patch attends to.
        takes_videos: whether it is talked with about videos.
    """

    pairable: bool
    takes_videos: bool
    model: Any
    tokenizer: Any
    patches: int | None

    def default(self) -> VisionZipConfig | None:
        """The setting that it came with, or that its family has; None leaves it to the page."""

    def vanilla(self) -> None:
        """Let it see all visual tokens."""

    def side(self, **generate_kwargs: Any) -> Side:
        """One side of a conversation, for the model as it is zipped when it is asked."""

    def picture(self, visual: Visual, picks: Picks | None = None, pairs: bool = False) -> dict[str, Any]:
        """What :func:`llava.picture.picture_data` says of an image or a video; with picks, what is kept by them."""


@contextmanager
def picked(model: Any, picks: Picks | None) -> Iterator[None]:
    """Patches picked by hand in the place of the method's, if there are any."""
    if picks is None:
        yield
    else:
        with picked_tokens(model, picks[0] if len(picks) == 1 else picks):
            yield

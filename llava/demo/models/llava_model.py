"""LLaVA's families on the page, in either layout, with an image processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from llava.demo.conversation.talk import Picks, StoppedError
from llava.demo.models.page_model import Side, picked
from llava.methods import patches_of
from llava.picture import picture_data
from llava.serve.chat import ChatSession
from llava.video import Visual
from visionzip import VisionZipConfig, unzip


class LlavaModel:
    """A model of LLaVA's families, in either layout.

    Args:
        tokenizer: as ``load_pretrained_model`` returns it, as the next two.
        model: it.
        image_processor: its image processor.
        conv_mode: prompt template.
    """

    pairable = True
    takes_videos = find_spec("av") is not None  # frames are images to a model without a place for videos

    def __init__(self, tokenizer: Any, model: Any, image_processor: Any, conv_mode: str) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.image_processor, self.conv_mode = image_processor, conv_mode
        self.patches = patches_of(model)

    def default(self) -> VisionZipConfig | None:
        """As :class:`PageModel` says."""
        return self.model.get_vision_tower().visionzip

    def vanilla(self) -> None:
        """As :class:`PageModel` says."""
        unzip(self.model)

    def side(self, **generate_kwargs: Any) -> Side:
        """As :class:`PageModel` says."""
        return _LlavaSide(self.model, self.tokenizer, self.image_processor, self.conv_mode, **generate_kwargs)

    def picture(self, visual: Visual, picks: Picks | None = None, pairs: bool = False) -> dict[str, Any]:
        """As :class:`PageModel` says."""
        with picked(self.model, picks):
            return picture_data(self.model, visual, self.image_processor, pairs)


class _LlavaSide(ChatSession):
    """Each image and video is encoded by itself, as it was picked."""

    def __init__(self, *args: Any, **generate_kwargs: Any) -> None:
        super().__init__(*args, **generate_kwargs)
        self.picks: list[Picks | None] = []
        self.is_stopped: Callable[[], bool] = lambda: False
        self.holds: Any = None
        self._encoded = 0  # images

    def resume(self, turns: Sequence[tuple[str, Sequence[Visual], str]]) -> None:
        self._encoded = 0
        super().resume(turns)

    def _encode(self, images: Sequence[Visual]) -> list[Any]:
        tokens: list[Any] = []
        for image in images:
            if self.is_stopped():
                raise StoppedError
            with picked(self.model, self.picks[self._encoded] if self._encoded < len(self.picks) else None):
                tokens += super()._encode([image])
            self._encoded += 1
        return tokens

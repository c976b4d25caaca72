"""Transformers' other families on the page, with their own processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

from PIL import Image
from transformers.generation.streamers import BaseStreamer

from llava.demo.conversation.talk import Picks
from llava.demo.models.page_model import Side, picked
from llava.methods import patches_of
from llava.model.stock.processor_model import inputs_of, prompt_of, user_turn
from llava.serve.chat import Turn
from llava.serve.processor_chat import ProcessorSession
from llava.video import Visual
from visionzip import VisionZipConfig, picked_tokens, unzip, visionzip
from visionzip.drawing.pair_attention import packed_pairs
from visionzip.integrations import family_of
from visionzip.integrations.seam.maps import inspect_picture, token_pairs
from visionzip.token_map import token_data

_MOST_PAIRED = 2048  # tokens of a picture: a page gets a byte for each pair of them


class ProcessorModel:
    """Any other model of transformers that VisionZip knows the encoder of, with its processor.

    Args:
        model: from :func:`llava.commands.loading.load_with_processor`, as the next one.
        processor: its processor.

    Raises:
        ValueError: the page cannot show what its encoder attends to.
    """

    takes_videos = False  # as in chat: transformers' processors of videos need torchvision

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.tokenizer, self._processor = model, processor.tokenizer, processor
        try:
            self._family = family_of(model)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if getattr(self._family, "encoder", None) is None:
            raise ValueError(
                f"the page shows attention, but VisionZip does not know the encoder of {type(model).__name__}: use "
                "visionzip chat"
            )
        self.patches = patches_of(model)
        self.pairable = self._family.encoder.pairs is not None

    def default(self) -> VisionZipConfig | None:
        """As :class:`PageModel` says."""
        on = getattr(self.model, "_visionzip", None)
        return on.config if on else self._family.default_config(self.model)

    def vanilla(self) -> None:
        """Zipped without leaving a token out: it answers as the stock model, and later turns go on from its cache."""
        visionzip(unzip(self.model), keep=1.0)

    def side(self, **generate_kwargs: Any) -> Side:
        """As :class:`PageModel` says."""
        return _ProcessorSide(self.model, self._processor, **generate_kwargs)

    def picture(self, visual: Visual, picks: Picks | None = None, pairs: bool = False) -> dict[str, Any]:
        """As :class:`PageModel` says; a "patch" is a token of the language model. Of tiles the whole image is shown."""
        image = cast("Image.Image", visual)
        prompt = prompt_of(self._processor, [user_turn("", 1)])
        inputs = inputs_of(self._processor, [prompt], [[image]]).to(self.model.device).to(self.model.dtype)
        with picked(self.model, picks):
            tokens = inspect_picture(self.model, inputs, image)
            on = self.model._visionzip
            runs = self._family.modalities["image"].runs(self.model.model, on.config, inputs)
        tile = token_data(tokens, (0.0, 0.0, float(image.width), float(image.height)))
        if pairs and self.pairable and tokens.num_patches <= _MOST_PAIRED:
            tile["pairs"] = packed_pairs(token_pairs(self.model, inputs))
        return {
            "size": list(image.size),
            "frames": None,
            "method": on.config.method,
            "setting": str(on.config),
            "patches": tokens.num_patches,
            "cls_token": False,
            "keeps_cls": False,
            "tokens": [sum(run.full for run in runs), sum(run.short for run in runs)],
            "layers": len(tokens.attention),
            "layer": tokens.layer,
            "pairable": self.pairable and tokens.num_patches <= _MOST_PAIRED,
            "pickable": sum(frames.number for frames in self._family.frames(self.model.model, inputs)) == 1,
            "tiles": [tile],
        }


class _ProcessorSide(ProcessorSession):
    """All images of a conversation go through the model at once, each as it was picked."""

    def __init__(self, model: Any, processor: Any, **generate_kwargs: Any) -> None:
        super().__init__(model, processor, **generate_kwargs)
        self.picks: list[Picks | None] = []
        self.is_stopped: Callable[[], bool] = lambda: False
        self.holds: Any = None

    def ask(self, text: str, images: Sequence[Any] = (), streamer: BaseStreamer | None = None) -> Turn:
        lists = [picks and picks[0] for picks in self.picks]  # of an image that is not cut into tiles
        with picked_tokens(self.model, lists) if any(self.picks) else nullcontext():
            return super().ask(text, images, streamer)

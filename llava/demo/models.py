"""What the page talks to: LLaVA's families with an image processor, and transformers' others with their own processor.

Both say what they keep of an image, and make one side of a conversation; the rest of the page knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from PIL import Image
from transformers.generation.streamers import BaseStreamer

from llava.demo.talk import Picks, StoppedError
from llava.methods import patches_of
from llava.model.stock.processor_model import inputs_of, prompt_of, user_turn
from llava.picture import picture_data
from llava.serve.chat import ChatSession, Turn
from llava.serve.processor_chat import ProcessorSession
from visionzip import VisionZipConfig, picked_tokens, unzip, visionzip
from visionzip.integrations import family_of
from visionzip.integrations.seam.maps import inspect_picture
from visionzip.token_map import token_data


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

    def resume(self, turns: Sequence[tuple[str, Sequence[Image.Image], str]]) -> None:
        """Take up a conversation: questions, their images, answers."""

    def ask(self, text: str, images: Sequence[Image.Image] = (), streamer: BaseStreamer | None = None) -> Turn:
        """Ask the next question."""


class PageModel(Protocol):
    """A model of the page.

    Attributes:
        model: it.
        tokenizer: its tokenizer.
        patches: of an image or tile, of which a budget is a number or a share; None where it depends on the image, so
            that a budget is a share.
        pairable: whether pictures can say what each patch attends to.
    """

    pairable: bool
    model: Any
    tokenizer: Any
    patches: int | None

    def default(self) -> VisionZipConfig | None:
        """The setting that it came with, or that its family has; None leaves it to the page."""

    def vanilla(self) -> None:
        """Let it see all visual tokens."""

    def side(self, **generate_kwargs: Any) -> Side:
        """One side of a conversation, for the model as it is zipped when it is asked."""

    def picture(self, image: Image.Image, picks: Picks | None = None, pairs: bool = False) -> dict[str, Any]:
        """What :func:`llava.picture.picture_data` says of an image; of one with picks, what is kept by them."""


@contextmanager
def _picked(model: Any, picks: Picks | None) -> Iterator[None]:
    """Patches picked by hand in the place of the method's, if there are any."""
    if picks is None:
        yield
    else:
        with picked_tokens(model, picks[0] if len(picks) == 1 else picks):
            yield


class LlavaModel:
    """A model of LLaVA's families, in either layout.

    Args:
        tokenizer: as ``load_pretrained_model`` returns it, as the next two.
        model: it.
        image_processor: its image processor.
        conv_mode: prompt template.
    """

    pairable = True

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

    def picture(self, image: Image.Image, picks: Picks | None = None, pairs: bool = False) -> dict[str, Any]:
        """As :class:`PageModel` says."""
        with _picked(self.model, picks):
            return picture_data(self.model, image, self.image_processor, pairs)


class _LlavaSide(ChatSession):
    """Each image is encoded by itself, as it was picked."""

    def __init__(self, *args: Any, **generate_kwargs: Any) -> None:
        super().__init__(*args, **generate_kwargs)
        self.picks: list[Picks | None] = []
        self.is_stopped: Callable[[], bool] = lambda: False
        self.holds: Any = None
        self._encoded = 0  # images

    def resume(self, turns: Sequence[tuple[str, Sequence[Any], str]]) -> None:
        self._encoded = 0
        super().resume(turns)

    def _encode(self, images: Sequence[Image.Image]) -> list[Any]:
        tokens: list[Any] = []
        for image in images:
            if self.is_stopped():
                raise StoppedError
            with _picked(self.model, self.picks[self._encoded] if self._encoded < len(self.picks) else None):
                tokens += super()._encode([image])
            self._encoded += 1
        return tokens


class ProcessorModel:
    """Any other model of transformers that VisionZip knows the encoder of, with its processor.

    Args:
        model: from :func:`llava.commands.arguments.load_with_processor`, as the next one.
        processor: its processor.

    Raises:
        ValueError: the page cannot show what its encoder attends to.
    """

    pairable = False

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

    def picture(self, image: Image.Image, picks: Picks | None = None, pairs: bool = False) -> dict[str, Any]:
        """As :class:`PageModel` says; a "patch" is a token of the language model. Of tiles the whole image is shown."""
        prompt = prompt_of(self._processor, [user_turn("", 1)])
        inputs = inputs_of(self._processor, [prompt], [[image]]).to(self.model.device).to(self.model.dtype)
        with _picked(self.model, picks):
            tokens = inspect_picture(self.model, inputs, image)
            on = self.model._visionzip
            runs = self._family.modalities["image"].runs(self.model.model, on.config, inputs)
        return {
            "size": list(image.size),
            "method": on.config.method,
            "setting": str(on.config),
            "patches": tokens.num_patches,
            "cls_token": False,
            "keeps_cls": False,
            "tokens": [sum(run.full for run in runs), sum(run.short for run in runs)],
            "layers": len(tokens.attention),
            "layer": tokens.layer,
            "pairable": False,
            "pickable": sum(frames.number for frames in self._family.frames(self.model.model, inputs)) == 1,
            "tiles": [token_data(tokens, (0.0, 0.0, float(image.width), float(image.height)))],
        }


class _ProcessorSide(ProcessorSession):
    """All images of a conversation go through the model at once, under one setting."""

    def __init__(self, model: Any, processor: Any, **generate_kwargs: Any) -> None:
        super().__init__(model, processor, **generate_kwargs)
        self.picks: list[Picks | None] = []
        self.is_stopped: Callable[[], bool] = lambda: False
        self.holds: Any = None

    def ask(self, text: str, images: Sequence[Any] = (), streamer: BaseStreamer | None = None) -> Turn:
        if any(self.picks) and len(self.picks) > 1:
            raise ValueError(
                f"patches were picked, but the conversation has {len(self.picks)} images, which this model sees under "
                "one setting: go back to the method, or begin a new conversation with one image"
            )
        with _picked(self.model, self.picks[0] if self.picks else None):
            return super().ask(text, images, streamer)

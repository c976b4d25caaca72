"""What a benchmark run needs of a model: prompts, images as it takes them, answers, and a method put on it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..config import RunConfig
from ..records import Question, Visual
from ..running.answers import Given
from ..running.methods import Run

_PIXEL_BYTES = 1 << 29  # of prepared images that are kept for the next run


@dataclass(frozen=True)
class Prompt:
    """A question, ready for the model but for its images.

    Attributes:
        place: of the question in its benchmark.
        question: it.
        text: the whole prompt, with a placeholder for each image.
        text_tokens: tokens that are not an image's.
        ids: (L,) token ids, of models that take them.
    """

    place: int
    question: Question
    text: str
    text_tokens: int
    ids: Tensor | None = None


@dataclass(frozen=True)
class Loaded:
    """A visual as the model gets it: an input and a (width, height) for each image or video, or why there are none."""

    images: tuple[Any, ...]
    sizes: tuple[tuple[int, int], ...]
    error: str | None = None

    @property
    def bytes(self) -> int:
        """What the inputs take."""
        tensors = sum(image.nbytes for image in self.images if isinstance(image, Tensor))
        return tensors + sum(3 * width * height for width, height in self.sizes) * (not tensors)


class Model(ABC):
    """A loaded model that answers benchmarks' questions.

    Args:
        inner: the model that methods are put on.
        skip_bad: an image that cannot be read is not an error, but the reason why its questions are not asked.
    """

    takes_templates: ClassVar[bool]  # whether ``--conv-mode`` is for it

    def __init__(self, inner: Any, skip_bad: bool = False) -> None:
        self.inner = inner
        self._skip_bad = skip_bad
        self.trained: dict[str, Any] = {}  # of eval.running.methods.trained_setting
        self._kept: OrderedDict[str, Loaded] = OrderedDict()
        self._bytes = 0

    # What a kind of model has to say

    @classmethod
    @abstractmethod
    def load(cls, config: RunConfig) -> Model:
        """Load the model that a run names, with no method on it."""

    @classmethod
    @abstractmethod
    def first_prompt(cls, question: Question, config: RunConfig, checkpoint: Any) -> str:
        """A question's prompt, without the weights: a run's answers are only mixed with those to the same prompts."""

    @abstractmethod
    def prepare(self, questions: Sequence[Question]) -> list[Prompt]:
        """The prompts of some questions, in their order."""

    @abstractmethod
    def inputs_of(self, images: Sequence[Image.Image], is_video: bool) -> Loaded:
        """Images, or a video's frames, as the model takes them."""

    @abstractmethod
    def answer(
        self, prompts: Sequence[Prompt], visuals: Sequence[Sequence[Loaded]], max_new_tokens: int
    ) -> tuple[list[str], list[int], tuple[float, float, float]]:
        """Answer a batch greedily.

        Returns:
            the texts; each prompt's visual tokens in the language model; and the seconds of vision tower and projector,
            prefill, and decoding, see :class:`Watch`.
        """

    @abstractmethod
    def attach(self, run: Run | None) -> None:
        """Put a run's method on the model, in the place of any that is on it; None takes it off.

        Raises:
            ValueError: the method or its budget is not for this model.
        """

    @abstractmethod
    def prefill(self, length: int, text_tokens: int, run: Run) -> tuple[Callable[[], Any], bool]:
        """What fills the KV cache of a prompt, for timing, and whether that is other work with the run's method on.

        Args:
            length: tokens of the prompt, visual ones included; its embeddings are random.
            text_tokens: of these, the last ones.
            run: that the prompt is of.
        """

    def vision(self, loaded: Loaded) -> Callable[[], Any] | None:
        """What makes visual tokens of pixels, for timing; None where that cannot be called alone."""
        return None

    def choosing(self, loaded: Loaded, runs: Sequence[Run]) -> dict[str, Callable[[], Any]]:
        """What chooses an image's tokens, of what was read of the encoder, by runs' names; none where unknown."""
        return {}

    @property
    def config(self) -> Any:
        """The language model's config."""
        return self.inner.config.get_text_config()

    # What all have in common

    @contextmanager
    def attached(self, run: Run) -> Iterator[None]:
        """The model with a run's method on it; as it was without any afterwards."""
        try:
            self.attach(run)
            yield
        finally:
            self.attach(None)

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return self.inner.get_input_embeddings().weight.device

    def visuals_of(self, batch: Sequence[Prompt]) -> dict[str, Loaded]:
        """A batch's visuals by their keys: opened when their batch comes, and kept as long as there is room.

        Raises:
            ValueError: one cannot be read, and ``skip_bad`` is not set.
        """
        visuals = {visual.key: visual for prompt in batch for visual in prompt.question.visuals}
        return {key: self._open(visual) for key, visual in visuals.items()}

    def _open(self, visual: Visual) -> Loaded:
        if visual.key in self._kept:
            return self._kept[visual.key]
        try:
            images = visual.open()
        except (ValueError, OSError) as error:
            if not self._skip_bad:
                raise ValueError(
                    f"{error} (what is answered is kept; --skip-bad counts such questions as wrong instead)"
                ) from error
            return Loaded((), (), str(error))
        loaded = self.inputs_of(images, visual.frames is not None)
        self._kept[visual.key] = loaded
        self._bytes += loaded.bytes
        while self._bytes > _PIXEL_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].bytes
        return loaded

    @torch.inference_mode()
    def answers_to(self, batch: Sequence[Prompt], visuals: Mapping[str, Loaded], max_new_tokens: int) -> list[Given]:
        """Answers to a batch of prompts; an empty one, with the reason, where an image could not be read."""
        own = {prompt.place: [visuals[visual.key] for visual in prompt.question.visuals] for prompt in batch}
        errors = {place: next(filter(None, (one.error for one in loaded)), None) for place, loaded in own.items()}
        asked = [prompt for prompt in batch if errors[prompt.place] is None]
        found = {prompt.place: Given(prompt.place, "", 0, error=errors[prompt.place]) for prompt in batch}
        if asked:
            texts, visual, seconds = self.answer(asked, [own[prompt.place] for prompt in asked], max_new_tokens)
            share = tuple(phase / len(asked) for phase in seconds)
            for prompt, text, tokens in zip(asked, texts, visual, strict=True):
                found[prompt.place] = Given(prompt.place, text.strip(), tokens, share)
        return list(found.values())


class Watch:
    """What happens in a call of ``generate``: its prompts' lengths and the seconds of its three phases."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.lengths: list[int] = []  # visual tokens included, as the language model gets them
        self._times = [self._now()]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the language model: the first is the prefill."""
        if len(self._times) == 1:
            embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")  # no mask where there is no padding
            if isinstance(mask, Mapping):  # by kind of layer
                mask = mask["full_attention"]
            if mask is not None and mask.ndim == 4:  # what the last token attends to
                last = mask[:, 0, -1]  # a size bias adds to what is seen
                mask = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
            self.lengths += [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(dim=1).tolist()
            self._times.append(self._now())

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """After a forward."""
        if len(self._times) == 2:
            self._times.append(self._now())

    def stop(self) -> None:
        """At the end of the call."""
        self._times.append(self._now())

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Of vision tower and projector, prefill, and decoding."""
        start, embedded, first, end = self._times
        return embedded - start, first - embedded, end - first


@contextmanager
def watched(module: Any, device: torch.device) -> Iterator[Watch]:
    """Watch a call of ``generate``, which gives a module embeddings for the prompt and then for each new token."""
    watch = Watch(device)
    handles = [
        module.register_forward_pre_hook(watch.before, with_kwargs=True),
        module.register_forward_hook(watch.after),
    ]
    try:
        yield watch
        watch.stop()
    finally:
        for handle in handles:
            handle.remove()

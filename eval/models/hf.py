"""Any other model of transformers: its own processor, its own chat template, its own ``generate``.

What LLaVA's interface cannot say (images of any size, another template, positions in three dimensions) stays in the
processor and the model. Methods go on it where the package supports the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from llava.methods import METHODS, detach
from llava.model.stock.processor_model import (
    inputs_of,
    load_model,
    load_processor,
    prompt_of,
    refuse_llava_flags,
    size_for,
    text_length,
    user_turn,
)

from ..config import RunConfig
from ..records import Question
from ..running.methods import Run, attach
from .base import Loaded, Model, Prompt, watched


def question_prompt(question: Question, processor: Any) -> str:
    """The whole prompt for a question, in the processor's template; images go where the text has ``<image>``.

    Raises:
        ValueError: the question is about a video, or its text has another number of ``<image>`` than images.
    """
    if any(visual.frames for visual in question.visuals):
        raise ValueError("videos are asked about with LLaVA's families alone: this model's processor gets images")
    try:
        return prompt_of(processor, [user_turn(question.text, len(question.visuals))])
    except ValueError as error:
        raise ValueError(f"question {question.id}: {error}") from error


class ProcessorModel(Model):
    """A model of ``AutoModelForImageTextToText`` with its ``AutoProcessor``.

    Args:
        inner: the model.
        processor: from :func:`llava.model.stock.processor_model.load_processor`.
        skip_bad: see :class:`Model`.
    """

    takes_templates = False

    def __init__(self, inner: Any, processor: Any, skip_bad: bool = False) -> None:
        super().__init__(inner, skip_bad)
        self._processor = processor
        self._attached = False
        self._size: dict[str, int] | None = None  # of pictures, in the place of the processor's own

    @classmethod
    def load(cls, config: RunConfig) -> ProcessorModel:
        """See :class:`Model`.

        Raises:
            ValueError: a flag is for LLaVA's families alone.
        """
        refuse_llava_flags(config)
        processor, dtype = load_processor(config.model_path), "auto" if "cuda" in config.device else torch.float32
        return cls(load_model(config.model_path, processor, config.device, dtype), processor, config.skip_bad)

    @classmethod
    def first_prompt(cls, question: Question, config: RunConfig, checkpoint: Any) -> str:
        """See :class:`Model`."""
        return question_prompt(question, load_processor(config.model_path))

    def prepare(self, questions: Sequence[Question]) -> list[Prompt]:
        """See :class:`Model`."""
        prompts = []
        for place, question in enumerate(questions):
            text, images = question_prompt(question, self._processor), len(question.visuals)
            around = images * self._around if images else 0
            prompts.append(Prompt(place, question, text, text_length(self._processor, text) + around))
        return prompts

    @cached_property
    def _around(self) -> int:
        """Tokens that the processor writes around an image, without the template's one placeholder of it."""
        text = prompt_of(self._processor, [user_turn("", 1)])
        inputs = inputs_of(self._processor, [text], [[Image.new("RGB", (64, 64))]])
        return self._text_tokens(inputs)[0] - text_length(self._processor, text)

    def inputs_of(self, images: Sequence[Image.Image], is_video: bool) -> Loaded:
        """See :class:`Model`."""
        return Loaded(tuple(images), tuple(image.size for image in images))

    def answer(
        self, prompts: Sequence[Prompt], visuals: Sequence[Sequence[Loaded]], max_new_tokens: int
    ) -> tuple[list[str], list[int], tuple[float, float, float]]:
        """See :class:`Model`."""
        images = [[image for one in of_prompt for image in one.images] for of_prompt in visuals]
        texts = [prompt.text for prompt in prompts]
        inputs = inputs_of(self._processor, texts, images, self._size).to(self.device)
        with watched(self.inner.get_decoder(), self.device) as watch:
            output = self.inner.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        visual = [length - text for length, text in zip(watch.lengths, self._text_tokens(inputs), strict=True)]
        return self._processor.batch_decode(new, skip_special_tokens=True), visual, watch.seconds

    def _text_tokens(self, inputs: Any) -> list[int]:
        """Tokens of each prompt that stand for no image; what the processor writes around one is text."""
        return (
            ((inputs["input_ids"] != self.inner.config.image_token_id) & inputs["attention_mask"].bool())
            .sum(1)
            .tolist()
        )

    def attach(self, run: Run | None) -> None:
        """See :class:`Model`."""
        if self._attached:
            detach(self.inner)
            self._attached = False
        self._size = None
        if run is None or run.tokens is None:
            return
        try:
            if METHODS[run.method].of_picture:
                self._size = size_for(self._processor, run.tokens)
                return
            attach(self.inner, run, self.trained)
        except TypeError as error:
            raise ValueError(f"--method {run.method}: {error}") from error
        self._attached = True

    def prefill(self, length: int, text_tokens: int, run: Run) -> tuple[Callable[[], Any], bool]:
        """See :class:`Model`. The head reads the last position, as in ``generate``."""
        weight = self.inner.get_input_embeddings().weight
        prompt = torch.randn(1, length, weight.shape[1], device=weight.device, dtype=weight.dtype)
        visual = torch.arange(length, device=weight.device)[None] < length - text_tokens
        decoder, head = self.inner.get_decoder(), self.inner.get_output_embeddings()
        more = {"visual_mask": visual} if run.inside else {}

        def fill() -> Any:
            output = decoder(inputs_embeds=prompt, use_cache=True, **more)
            head(output.last_hidden_state[:, -1:])
            return output

        return fill, run.inside

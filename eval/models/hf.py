"""Any other model of transformers: its own processor, its own chat template, its own ``generate``.

What LLaVA's interface cannot say (images of any size, another template, positions in three dimensions) stays in the
processor and the model. VisionZip goes on it where the package supports the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.constants import DEFAULT_IMAGE_TOKEN
from visionzip import unzip, visionzip

from ..config import RunConfig
from ..methods import Run
from ..records import Question
from .base import Loaded, Model, Prompt, watched


@lru_cache(maxsize=1)  # a run asks for a prompt first and loads the weights then
def load_processor(path: str) -> Any:
    """Load a checkpoint's processor, set up to pad on the left.

    Raises:
        ValueError: it has no chat template.
    """
    processor = AutoProcessor.from_pretrained(path)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{path} has no chat template (chat_template.jinja): copy the one of its model there")
    processor.tokenizer.padding_side = "left"
    return processor


def prompt_of(question: Question, processor: Any) -> str:
    """The whole prompt for a question, in the processor's template; images go where the text has ``<image>``.

    Raises:
        ValueError: the question is about a video, or its text has another number of ``<image>`` than images.
    """
    if any(visual.frames for visual in question.visuals):
        raise ValueError("videos are asked about with LLaVA's families alone: this model's processor gets images")
    pieces = question.text.split(DEFAULT_IMAGE_TOKEN)
    if len(pieces) == 1:
        pieces = [*[""] * len(question.visuals), question.text]
    if len(pieces) - 1 != len(question.visuals):
        raise ValueError(
            f"question {question.id}: its text has {len(pieces) - 1} {DEFAULT_IMAGE_TOKEN} for {len(question.visuals)} "
            "images"
        )
    content = []
    for number, piece in enumerate(pieces):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    turn = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


class ProcessorModel(Model):
    """A model of ``AutoModelForImageTextToText`` with its ``AutoProcessor``.

    Args:
        inner: the model.
        processor: from :func:`load_processor`.
        skip_bad: see :class:`Model`.
    """

    takes_templates = False

    def __init__(self, inner: Any, processor: Any, skip_bad: bool = False) -> None:
        super().__init__(inner, skip_bad)
        self._processor = processor
        self._zipped = False

    @classmethod
    def load(cls, config: RunConfig) -> ProcessorModel:
        """See :class:`Model`.

        Raises:
            ValueError: a flag is for LLaVA's families alone.
        """
        for flag in ("model_base", "load_8bit", "load_4bit"):
            if getattr(config, flag):
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} is for LLaVA's families: {config.model_path} is of another, leave it out")
        processor, dtype = load_processor(config.model_path), "auto" if "cuda" in config.device else torch.float32
        inner = AutoModelForImageTextToText.from_pretrained(config.model_path, dtype=dtype).to(config.device).eval()
        if inner.generation_config.pad_token_id is None:
            inner.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return cls(inner, processor, config.skip_bad)

    @classmethod
    def first_prompt(cls, question: Question, config: RunConfig, checkpoint: Any) -> str:
        """See :class:`Model`."""
        return prompt_of(question, load_processor(config.model_path))

    def prepare(self, questions: Sequence[Question]) -> list[Prompt]:
        """See :class:`Model`."""
        prompts = []
        for place, question in enumerate(questions):
            text = prompt_of(question, self._processor)
            ids = self._processor.tokenizer(text, **self._no_second_start([text])).input_ids
            prompts.append(Prompt(place, question, text, len(ids) - len(question.visuals)))
        return prompts

    def _no_second_start(self, texts: Sequence[str]) -> dict[str, bool]:
        start = self._processor.tokenizer.bos_token
        return {"add_special_tokens": not (start and all(text.startswith(start) for text in texts))}

    def inputs_of(self, images: Sequence[Image.Image], is_video: bool) -> Loaded:
        """See :class:`Model`."""
        return Loaded(tuple(images), tuple(image.size for image in images))

    def answer(
        self, prompts: Sequence[Prompt], visuals: Sequence[Sequence[Loaded]], max_new_tokens: int
    ) -> tuple[list[str], list[int], tuple[float, float, float]]:
        """See :class:`Model`."""
        images = [[image for one in of_prompt for image in one.images] for of_prompt in visuals]
        texts = [prompt.text for prompt in prompts]
        inputs = self._processor(
            text=texts,
            images=[own for own in images if own] or None,
            padding=True,
            return_tensors="pt",
            **self._no_second_start(texts),
        ).to(self.device)
        with watched(self.inner.get_decoder(), self.device) as watch:
            output = self.inner.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        return self._processor.batch_decode(new, skip_special_tokens=True), watch.lengths, watch.seconds

    def attach(self, run: Run | None) -> None:
        """See :class:`Model`."""
        if self._zipped:
            unzip(self.inner)
            self._zipped = False
        if run is None or run.tokens is None:
            return
        name = type(self.inner).__name__
        if run.inside:
            raise ValueError(f"--method {run.method}: it prunes inside LLaVA's language models, not in {name}")
        budget = dict(zip(("dominant", "contextual"), run.split or (), strict=False))
        budget = budget or {"keep": run.tokens, "method": run.method, "seed": run.seed}
        try:
            visionzip(self.inner, **budget, positions=run.positions, size_bias=run.size_bias)
        except TypeError as error:
            raise ValueError(f"--method {run.method}: {error}") from error
        self._zipped = True

    def prefill(self, length: int, text_tokens: int, run: Run) -> tuple[Callable[[], Any], bool]:
        """See :class:`Model`. The head reads the last position, as in ``generate``."""
        weight = self.inner.get_input_embeddings().weight
        prompt = torch.randn(1, length, weight.shape[1], device=weight.device, dtype=weight.dtype)
        decoder, head = self.inner.get_decoder(), self.inner.get_output_embeddings()

        def fill() -> Any:
            output = decoder(inputs_embeds=prompt, use_cache=True)
            head(output.last_hidden_state[:, -1:])
            return output

        return fill, False

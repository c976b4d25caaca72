"""LLaVAs, in-tree and of transformers: LLaVA's templates, its image sentinel in the ids, pixels beside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from llava.commands.loading import load_from_arguments
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import new_conversation, with_image_tokens
from llava.methods import detach
from llava.mm_utils import tokenizer_image_token
from llava.model.stock.transformers_llava import generating_module
from llava.video import process_visuals
from visionzip import VisionZipConfig
from visionzip.encoder import choose_tokens, read_encoder
from visionzip.methods import has_size_bias

from ..config import RunConfig
from ..records import Question
from ..running.methods import Run, attach
from .base import Loaded, Model, Prompt, watched


def prompt_of(question: Question, config: Any, conv_mode: str) -> str:
    """The whole prompt for a question, in a template."""
    conversation = new_conversation(conv_mode)
    counts = [visual.frames or 1 for visual in question.visuals]
    conversation.append_message(conversation.roles[0], with_image_tokens(question.text, counts, config))
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


class LlavaModel(Model):
    """A model of :func:`llava.model.builder.load_pretrained_model`.

    Args:
        inner: it; the next two come with it.
        tokenizer: its tokenizer.
        image_processor: its image processor.
        conv_mode: key of ``llava.conversation.conv_templates``.
        skip_bad: see :class:`Model`.
    """

    takes_templates = True

    def __init__(
        self, inner: Any, tokenizer: Any, image_processor: Any, conv_mode: str, skip_bad: bool = False
    ) -> None:
        super().__init__(inner, skip_bad)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._conv_mode = conv_mode

    @classmethod
    def load(cls, config: RunConfig) -> LlavaModel:
        """See :class:`Model`."""
        bare = replace(config, dominant=None, contextual=None, positions=None, size_bias=None)  # they are in the runs
        tokenizer, inner, image_processor, conv_mode = load_from_arguments(bare, vanilla=True)
        return cls(inner, tokenizer, image_processor, conv_mode, config.skip_bad)

    @classmethod
    def first_prompt(cls, question: Question, config: RunConfig, checkpoint: Any) -> str:
        """See :class:`Model`."""
        return prompt_of(question, checkpoint, config.conv_mode)

    @property
    def config(self) -> Any:
        """The model's, which has the language model's fields."""
        return self.inner.config

    def prepare(self, questions: Sequence[Question]) -> list[Prompt]:
        """See :class:`Model`."""
        prompts = []
        for place, question in enumerate(questions):
            text = prompt_of(question, self.config, self._conv_mode)
            ids = tokenizer_image_token(text, self._tokenizer, return_tensors="pt")
            prompts.append(Prompt(place, question, text, int((ids != IMAGE_TOKEN_INDEX).sum()), ids))
        return prompts

    def inputs_of(self, images: Sequence[Image.Image], is_video: bool) -> Loaded:
        """See :class:`Model`."""
        tensors, sizes = process_visuals([images] if is_video else images, self._image_processor, self.inner)
        return Loaded(tuple(tensors), tuple(sizes))

    def answer(
        self, prompts: Sequence[Prompt], visuals: Sequence[Sequence[Loaded]], max_new_tokens: int
    ) -> tuple[list[str], list[int], tuple[float, float, float]]:
        """See :class:`Model`."""
        ids = [prompt.ids for prompt in prompts]
        pad = self.inner.generation_config.pad_token_id
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
        loaded = [one for of_prompt in visuals for one in of_prompt]
        with watched(generating_module(self.inner), self.inner.device) as watch:
            output = self.inner.generate(
                pad_sequence(ids, batch_first=True, padding_value=pad or 0, padding_side="left").to(self.device),
                attention_mask=mask.to(self.device),
                images=[image for one in loaded for image in one.images] or None,
                image_sizes=[size for one in loaded for size in one.sizes] or None,
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
        visual = [length - prompt.text_tokens for length, prompt in zip(watch.lengths, prompts, strict=True)]
        return self._tokenizer.batch_decode(output, skip_special_tokens=True), visual, watch.seconds

    def attach(self, run: Run | None) -> None:
        """See :class:`Model`."""
        if run is None:
            detach(self.inner)
        else:
            attach(self.inner, run, self.trained)

    def prefill(self, length: int, text_tokens: int, run: Run) -> tuple[Callable[[], Any], bool]:
        """See :class:`Model`."""
        weight = self.inner.get_input_embeddings().weight
        prompt = torch.randn(1, length, self.config.hidden_size, device=weight.device, dtype=weight.dtype)
        visual = torch.arange(length, device=weight.device)[None] < length - text_tokens
        given = {"inputs_embeds": prompt, "visual_mask": visual}
        if sized := self._is_sized(run):  # what a size bias needs is in the arguments
            given["token_sizes"] = torch.where(visual, self.inner.frame_length / run.tokens, 1.0)
        return partial(self.inner, use_cache=True, logits_to_keep=1, **given), sized or run.inside

    def _is_sized(self, run: Run) -> bool:
        """Whether a run's tokens come to the language model with sizes, in prompts that are embeddings."""
        if run.tokens is None or run.inside or "token_sizes" not in inspect.signature(self.inner.forward).parameters:
            return False
        with self.attached(run):
            return has_size_bias(VisionZipConfig.from_dict(self.inner.config.visionzip))

    def vision(self, loaded: Loaded) -> Callable[[], Any]:
        """See :class:`Model`."""
        return partial(self.inner.visual_tokens, [loaded.images[0]], [loaded.sizes[0]])

    def choosing(self, loaded: Loaded, runs: Sequence[Run]) -> dict[str, Callable[[], Any]]:
        """See :class:`Model`. Of tiles, the first is taken."""
        tower, image, found = self.inner.get_vision_tower(), loaded.images[0], {}
        projector = getattr(self.inner, "mm_projector", None) or self.inner.get_model().mm_projector
        pixels = image.reshape(-1, *image.shape[-3:])[:1].to(device=tower.device, dtype=tower.dtype)
        for run in runs:
            with self.attached(run):
                setting = self.inner.get_vision_tower().visionzip
                read = read_encoder(tower.encoder, pixels, setting)
            found[run.name] = partial(choose_tokens, read, setting, projector)
        return found

"""Timing of any other model of transformers, from the tensors that its own processor makes of pictures of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava.measure.meters.runner import Watch, Way
from llava.methods import METHODS, detach, patches_of, per_tile
from llava.model.stock.processor_model import inputs_of, prompt_of, size_for, text_length, user_turn


@dataclass(frozen=True)
class PicturePrompt:
    """The same text for each of a batch of different pictures.

    Attributes:
        text: in the model's template.
        images: of one size, noise.
        text_tokens: of each prompt, those that the processor writes around a picture included.
    """

    text: str
    images: list[Image.Image]
    text_tokens: int


class ProcessorRunner:
    """A model whose methods take turns, as :class:`llava.measure.meters.runner.Runner`, but for the phases.

    "vision" is all before the language model: encoder, merger, choosing, shortening. What the processor does is not
    timed.

    Args:
        model: with nothing on it.
        processor: its own.
        text_tokens: about so many in each prompt, the template's included.
        batch: prompts at a time.
        edge: of the pictures, in pixels.
        new_tokens: how many it answers.
    """

    def __init__(self, model: Any, processor: Any, text_tokens: int, batch: int, edge: int, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        self._processor, self._attached = processor, False
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (batch, edge, edge, 3), generator=generator, dtype=torch.uint8).numpy()
        self._images = [Image.fromarray(picture) for picture in noise]
        self._text = self._prompt_of(text_tokens)
        self._whole = self._prepare(None)
        self._inputs = self._whole
        text = int((self._whole["input_ids"][0] != model.config.image_token_id).sum())
        self.prompt = PicturePrompt(self._text, self._images, text)

    def _prompt_of(self, tokens: int) -> str:
        few, more = (prompt_of(self._processor, [user_turn(" the" * words, 1)]) for words in (1, 9))
        base, rest = (text_length(self._processor, text) for text in (few, more))
        words = 1 + max(0, 8 * (tokens - base) // max(1, rest - base))
        return prompt_of(self._processor, [user_turn(" the" * words, 1)])

    def _prepare(self, size: dict[str, int] | None) -> Any:
        texts, images = [self._text] * len(self._images), [[image] for image in self._images]
        inputs = inputs_of(self._processor, texts, images, size).to(self.model.device)
        return inputs.to(self.model.dtype)  # pixels alone: ids are whole numbers

    def attach(self, way: Way) -> None:
        """Put a way on the model, or in the place of the pictures, instead of the one that is there.

        Raises:
            ValueError: the budget leaves nothing out, or the method refuses it or the model.
        """
        self.detach()
        visual = int((self._whole["input_ids"][0] == self.model.config.image_token_id).sum())
        if way.tokens is not None and way.tokens >= visual:
            raise ValueError(f"--tokens {way.tokens}: a picture has {visual} visual tokens here; give fewer")
        if METHODS[way.method].of_picture:
            self._inputs = self._prepare(size_for(self._processor, way.tokens))
        elif way.tokens is not None:
            try:
                patches = patches_of(self.model)  # of a tile, where a picture is cut into some
                tokens = way.tokens if patches is None else per_tile(way.tokens, visual // patches)
                METHODS[way.method].attach(self.model, tokens, 0)
            except TypeError as error:
                raise ValueError(f"--method {way.method}: {error}") from error
            self._attached = True

    def detach(self) -> None:
        """Leave the model as it was."""
        self._inputs = self._whole
        if self._attached:
            detach(self.model)
            self._attached = False

    def once(self) -> Watch:
        """Answer the prompt; its phases are marked."""
        watch = Watch(self.model.device, None)

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if "vision" not in watch.ends:
                watch.prompt_tokens = kwargs["inputs_embeds"].shape[1]
                watch.mark("vision")

        handles = [
            self.model.get_decoder().register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(watch.after_forward),
        ]
        try:
            self.model.generate(
                **self._inputs, do_sample=False, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens
            )
            watch.mark("decode")
        finally:
            for handle in handles:
                handle.remove()
        return watch

"""A conversation with any other model of transformers: its own processor and chat template, with a kept KV cache.

A zipped model is given the whole conversation with the cache of its beginning, and feeds only what is new: images of
earlier turns are neither encoded nor prefilled again. (Stock classes would encode them; so where no token is to be
left out, VisionZip with ``keep=1.0``, which answers as the stock model, keeps the cache too.) Models that are not
zipped, and those whose layers have a state that cannot be cut, are asked the whole conversation anew each time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from llava.model.generation import check_settings
from llava.model.stock.processor_model import Message, assistant_turn, inputs_of, prompt_of, user_turn
from llava.serve.turns import OWN_ARGUMENTS, REFUSED_OF_CONVERSATIONS, Clock, Turn, answer_settings
from llava.video import Visual


class ProcessorSession:
    """A conversation with a model of transformers and its processor.

    Args:
        model: zipped or not.
        processor: from :func:`llava.model.stock.processor_model.load_processor`.
        **generate_kwargs: for ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, …

    Raises:
        ValueError: a setting, also of the model's own generation config, is not for one answer to a conversation.
    """

    roles = ("USER", "ASSISTANT")

    def __init__(self, model: Any, processor: Any, **generate_kwargs: Any) -> None:
        if taken := sorted(OWN_ARGUMENTS & generate_kwargs.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be given to a session: it gives them to generate itself")
        check_settings(REFUSED_OF_CONVERSATIONS, model, generate_kwargs)
        self.generate_kwargs = answer_settings(generate_kwargs)
        self.model = model
        self.tokenizer = processor.tokenizer
        self._processor = processor
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        self._keeps_cache = hasattr(model, "_visionzip") and "linear_attention" not in kinds
        self.reset()

    def reset(self) -> None:
        """Forget everything said and seen."""
        self._messages: list[Message] = []
        self._images: list[Image.Image] = []
        self.visual_tokens = 0  # of all images of the conversation
        self._forget_cache()

    def resume(self, turns: Sequence[tuple[str, Sequence[Visual], str]]) -> None:
        """Take up a conversation from its words, such as under another VisionZip setting: the next turn feeds it anew.

        Args:
            turns: for each its question, the images that were new in it, and the answer.

        Raises:
            ValueError: ``<image>`` and images differ in number. The conversation is then as it was.
        """
        messages: list[Message] = []
        for text, images, answer in turns:
            messages += [user_turn(text, len(images)), assistant_turn(answer)]
        self._messages, self._images = messages, [image for _, images, _ in turns for image in images]
        self._forget_cache()

    def _forget_cache(self) -> None:
        # Without the model's config, which would give sliding windows a cache that cannot be cropped.
        self._cache = DynamicCache() if self._keeps_cache else None
        self._cached: list[int] = []  # the prompt, as the processor writes it, and the answer that the cache holds

    @property
    def prompt(self) -> str:
        """The conversation in the model's template, as it would be asked on."""
        return prompt_of(self._processor, self._messages)

    @torch.no_grad()
    def ask(self, text: str, images: Sequence[Visual] = (), streamer: BaseStreamer | None = None) -> Turn:
        """Ask the next question.

        Args:
            text: the question; ``<image>`` in it says where the images go, else they go in front.
            images: PIL images that are new in this turn.
            streamer: gets the new tokens as they come.

        Returns:
            The answer and what it cost. It ends at the model's context at the latest.

        Raises:
            ValueError: one is no PIL image, ``<image>`` and images differ in number, or the conversation exceeds the
                model's context.
            RuntimeError: the cache does not hold what was said. In either case the conversation is then as it was.
        """
        if not all(isinstance(image, Image.Image) for image in images):
            raise ValueError("videos are talked about with LLaVA's families alone: this model's processor gets images")
        start = time.perf_counter()
        messages, seen = [*self._messages, user_turn(text, len(images))], [*self._images, *images]
        inputs = inputs_of(self._processor, [prompt_of(self._processor, messages)], [seen]).to(self.model.device)
        ids = inputs["input_ids"][0].tolist()
        left_out = self._left_out(inputs)
        room = self._room(len(ids), left_out)
        known, cached = self._reuse(ids)
        more = {} if self._cache is None else {"past_key_values": self._cache}
        clock = Clock(streamer)
        handle = self.model.get_decoder().register_forward_pre_hook(clock.before_prefill, with_kwargs=True)
        try:
            settings = self.generate_kwargs | {"max_new_tokens": min(self.generate_kwargs["max_new_tokens"], room)}
            new_ids = self.model.generate(**inputs, **more, streamer=clock, **settings)[0, len(ids) :].tolist()
            self._check_cache(cached + clock.fed + len(new_ids) - 1)
        except BaseException:  # stopped half-way, the cache holds what nobody knows: the next turn fills a new one
            self._forget_cache()
            raise
        finally:
            handle.remove()
        self._cached = (ids + new_ids)[:-1] if self._keeps_cache else []
        answer = self.tokenizer.decode(new_ids, skip_special_tokens=True).strip()
        self._messages, self._images = [*messages, assistant_turn(answer)], seen
        self.visual_tokens = ids.count(self.model.config.image_token_id) - left_out
        visual = clock.fed - sum(token != self.model.config.image_token_id for token in ids[known:])
        return Turn(
            text=answer,
            visual_tokens=visual,
            fed_tokens=clock.fed,
            cached_tokens=cached,
            new_tokens=len(new_ids),
            vision_seconds=clock.start - start if visual else 0.0,
            prefill_seconds=clock.first - clock.start,
            decode_seconds=clock.last - clock.first,
        )

    def _left_out(self, inputs: Mapping[str, Any]) -> int:
        """Visual tokens of a conversation that the language model does not see."""
        zipped = getattr(self.model, "_visionzip", None)
        if zipped is None:
            return 0
        modalities = [modality for modality in zipped.family.modalities.values() if modality.pixels in inputs]
        runs = [run for modality in modalities for run in modality.runs(self.model.model, zipped.config, inputs)]
        return sum(run.full - run.short for run in runs)

    def _room(self, length: int, left_out: int) -> int:
        """Tokens that an answer may have: what the prompt leaves of the model's context.

        Raises:
            ValueError: it leaves nothing.
        """
        limit = self.model.config.get_text_config().max_position_embeddings
        zipped = getattr(self.model, "_visionzip", None)
        if zipped is not None and not zipped.original:  # else the answer's positions count what is left out
            length -= left_out
        if length >= limit:
            raise ValueError(
                f"the conversation has {length} tokens but the model's context is {limit}: reset it, or keep fewer "
                "visual tokens"
            )
        return limit - length

    def _check_cache(self, wanted: int) -> None:
        if self._cache is not None and (held := self._cache.get_seq_length()) != wanted:
            raise RuntimeError(
                f"the cache has {held} positions, but the conversation {wanted}: something else has fed or cut it, so "
                "that the answer cannot be trusted. Ask again: the next turn fills a new cache"
            )

    def _reuse(self, ids: list[int]) -> tuple[int, int]:
        """Crop the cache to what it shares with a prompt; how many of the prompt's ids that is, and of its positions.

        As in :class:`llava.serve.chat.ChatSession`, the prompt is tokenized whole each turn, and the cache is cut where
        the model's own tokens differ from that. It is not cut among the images.
        """
        known = 0
        while known < min(len(self._cached), len(ids) - 1) and self._cached[known] == ids[known]:
            known += 1
        if self._cache is None or self.model.config.image_token_id in self._cached[known:]:
            self._forget_cache()
            return 0, 0
        self._cache.crop(known - len(self._cached))
        return known, self._cache.get_seq_length()

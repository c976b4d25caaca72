"""A conversation that keeps its KV cache: an image is encoded and prefilled once, later turns feed only new text.

VisionZip chooses visual tokens without looking at the text, so those of the first turn stay right for every later one.
A method that prunes by the question would have to prefill the image again for each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, new_conversation, with_image_tokens
from llava.mm_utils import tokenizer_image_token
from llava.model.generation import REFUSED, check_settings
from llava.model.prompts import Row, splice
from llava.model.visual import VisualTokens
from llava.serve.turns import OWN_ARGUMENTS, REFUSED_OF_CONVERSATIONS, Clock, Turn, answer_settings
from llava.video import Visual, process_visuals
from visionzip.encoder import check_tokens


class ChatSession:
    """A conversation with a LLaVA model, zipped or not.

    Args:
        model: from ``load_pretrained_model``, as are the next two.
        tokenizer: its tokenizer.
        image_processor: its image processor.
        conv_mode: key of ``llava.conversation.conv_templates``.
        **generate_kwargs: for ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, …

    Raises:
        ValueError: the template is unknown, or has no turns; or a setting, also of the model's own generation config,
            is not for one answer to a conversation with one cache.
    """

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, conv_mode: str = "vicuna_v1", **generate_kwargs: Any
    ) -> None:
        if new_conversation(conv_mode).sep_style is SeparatorStyle.PLAIN:
            raise ValueError(f"conv_mode={conv_mode!r} is for pretraining and has no turns: use 'vicuna_v1' or another")
        if taken := sorted(OWN_ARGUMENTS & generate_kwargs.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be given to a session: it gives them to generate itself")
        check_settings(REFUSED | REFUSED_OF_CONVERSATIONS, model, generate_kwargs)
        generate_kwargs = answer_settings(generate_kwargs)
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.conv_mode = conv_mode
        self.generate_kwargs = generate_kwargs
        self.reset()

    @property
    def roles(self) -> tuple[str, str]:
        """What the template calls the user and the model."""
        user, assistant = self.conversation.roles
        return user or "USER", assistant or "ASSISTANT"

    @property
    def prompt(self) -> str:
        """The conversation in its template."""
        return self.conversation.get_prompt()

    def reset(self) -> None:
        """Forget everything said and seen."""
        self.conversation = new_conversation(self.conv_mode)
        self._visual: list[VisualTokens] = []  # of each image and frame, in order
        self._forget_cache()

    @torch.no_grad()
    def resume(self, turns: Sequence[tuple[str, Sequence[Visual], str]]) -> None:
        """Take up a conversation from its words, such as under another VisionZip setting: the next turn feeds it anew.

        Args:
            turns: for each its question, the images and videos that were new in it, and the answer.

        Raises:
            TypeError: one is neither a PIL image nor a video's frames.
            ValueError: ``<image>`` and images differ in number. In either case the conversation is as it was.
        """
        conversation = new_conversation(self.conv_mode)
        user, assistant = conversation.roles
        visual: list[VisualTokens] = []
        for text, images, answer in turns:
            conversation.append_message(user, self._question(text, images))
            conversation.append_message(assistant, answer)
            visual += self._encode(images)
        self.conversation, self._visual = conversation, visual
        self._forget_cache()

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all images and frames of the conversation."""
        return sum(len(image.tokens) for image in self._visual)

    def _question(self, text: str, images: Sequence[Visual]) -> str:
        counts = [1 if isinstance(image, Image.Image) else len(image) for image in images]
        return with_image_tokens(text, counts, self.model.config)

    def _forget_cache(self) -> None:
        # Without the model's config, which would give sliding windows a cache that cannot be cropped.
        self._cache = DynamicCache()
        self._cached: list[int] = []  # what each place of the cache holds; see _prompt

    @torch.no_grad()
    def ask(self, text: str, images: Sequence[Visual] = (), streamer: BaseStreamer | None = None) -> Turn:
        """Ask the next question.

        Args:
            text: the question; ``<image>`` in it says where the images go, else they go in front.
            images: PIL images that are new in this turn, and videos, each as its frames (``llava.video.load_video``).
            streamer: gets the new tokens as they come.

        Returns:
            The answer and what it cost. It ends at the model's context at the latest.

        Raises:
            TypeError: one is neither a PIL image nor such frames.
            ValueError: ``<image>`` and images differ in number, or the conversation exceeds the model's context.
            RuntimeError: the cache does not hold what was said. In either case the conversation is then as it was.
        """
        question = self._question(text, images)
        start = time.perf_counter()
        visual = self._encode(images)
        vision_seconds = time.perf_counter() - start if visual else 0.0

        conversation = self.conversation.copy()
        user, assistant = conversation.roles
        conversation.append_message(user, question)
        conversation.append_message(assistant, None)
        positions, row = self._prompt(conversation.get_prompt(), self._visual + visual)
        known = self._reuse(positions)

        clock = Clock(streamer)
        new_ids = self._generate(row, len(positions), clock)
        self._cached = (positions + new_ids)[:-1]
        self._visual += visual
        answer = self.tokenizer.decode(new_ids, skip_special_tokens=True).strip()
        # An image that the model only writes about is none.
        conversation.messages[-1][1] = answer.replace(DEFAULT_IMAGE_TOKEN, "")
        self.conversation = conversation
        return Turn(
            text=answer,
            visual_tokens=sum(len(image.tokens) for image in visual),
            fed_tokens=len(positions) - known,
            cached_tokens=known,
            new_tokens=len(new_ids),
            vision_seconds=vision_seconds,
            prefill_seconds=clock.first - clock.start,
            decode_seconds=clock.last - clock.first,
        )

    def _generate(self, row: Row, length: int, clock: Clock) -> list[int]:
        """The answer's ids; they and the prompt, of so many tokens, are in the cache then, but for the last."""
        room = self.model.config.max_position_embeddings - row.end
        sizes = {} if row.sizes is None else {"token_sizes": row.sizes[None]}
        try:
            new_ids = self.model.generate(
                inputs_embeds=row.embeds[None],  # the whole prompt: generate slices away what is cached
                attention_mask=torch.ones(1, length, dtype=torch.long, device=row.embeds.device),
                position_ids=row.positions[None],
                past_key_values=self._cache,
                **sizes,
                streamer=clock,
                **self.generate_kwargs | {"max_new_tokens": min(self.generate_kwargs["max_new_tokens"], room)},
            )[0].tolist()
            self._check_cache(length, len(new_ids))
        except BaseException:  # stopped half-way, the cache holds what nobody knows: the next turn fills a new one
            self._forget_cache()
            raise
        return new_ids

    def _check_cache(self, prompt: int, new: int) -> None:
        """Check that the cache holds the prompt and the answer but for its last token, which has not been fed.

        Raises:
            RuntimeError: it has another length.
        """
        if (held := self._cache.get_seq_length()) != prompt + new - 1:
            raise RuntimeError(
                f"the cache has {held} positions, but the conversation {prompt + new - 1}: something else has fed or "
                "cut it, so that the answer cannot be trusted. Leave out what is given to generate besides, and ask "
                "again: the next turn fills a new cache"
            )

    def _encode(self, images: Sequence[Visual]) -> list[VisualTokens]:
        if not images:
            return []
        visual = self.model.placed_tokens(*process_visuals(images, self.image_processor, self.model))
        check_tokens([image.tokens for image in visual])
        if visual[0].tokens.is_cuda:
            torch.cuda.synchronize()
        return visual

    def _prompt(self, prompt: str, visual: list[VisualTokens]) -> tuple[list[int], Row]:
        """What stands at each place of a prompt, to compare with the cache, and the prompt as the model gets it.

        A text token stands as its id; all of image number i as -1 - i.
        """
        ids = tokenizer_image_token(prompt, self.tokenizer)
        remaining = iter(enumerate(visual))
        standing: list[int] = []
        for token in ids:
            if token == IMAGE_TOKEN_INDEX:
                number, image = next(remaining)
                standing += [-1 - number] * len(image.tokens)
            else:
                standing.append(token)
        embed = self.model.get_input_embeddings()
        row = splice(torch.tensor(ids, device=embed.weight.device), visual, embed, None)
        limit = self.model.config.max_position_embeddings
        if row.end >= limit:
            has = f"{len(standing)} tokens" + (f" at {row.end} positions" if row.end > len(standing) else "")
            raise ValueError(
                f"the conversation has {has} but the model's context is {limit}: reset it, or use smaller VisionZip "
                "budgets" + (" with positions='consecutive'" if row.end > len(standing) else "")
            )
        return standing, row

    def _reuse(self, positions: list[int]) -> int:
        """Crop the cache to what it shares with the prompt; how many positions that is.

        The prompt is tokenized whole each turn, so that answers are those of recomputing everything. Where the model's
        own tokens differ from how its text is tokenized, the cache is cut there. One position is always fed.
        """
        known = 0
        for cached, wanted in zip(self._cached, positions[:-1], strict=False):
            if cached != wanted:
                break
            known += 1
        self._cache.crop(known - len(self._cached))
        self._cached = self._cached[:known]
        return known

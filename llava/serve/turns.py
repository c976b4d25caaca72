"""A turn of a conversation: the answer, what it cost, and how it was asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llava.model.generation import Refused


@dataclass(frozen=True)
class Turn:
    """An answer and what it cost.

    Attributes:
        text: the answer.
        visual_tokens: visual tokens that this turn brought.
        fed_tokens: tokens, visual ones included, that went through the language model before the first new one.
        cached_tokens: tokens before them, whose keys and values were kept from earlier turns.
        new_tokens: tokens of the answer, with the end token if there was one.
        vision_seconds: preparing and encoding this turn's images and videos; 0 without any.
        prefill_seconds: language model, from the prompt's embeddings to the first new token.
        decode_seconds: from the first new token to the last.
    """

    text: str
    visual_tokens: int
    fed_tokens: int
    cached_tokens: int
    new_tokens: int
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float

    def __str__(self) -> str:
        speed = f", {(self.new_tokens - 1) / self.decode_seconds:.1f}/s" if self.new_tokens > 1 else ""
        vision = f"vision {self.vision_seconds * 1e3:.0f} ms · " if self.visual_tokens else ""
        return (
            f"{self.fed_tokens} tokens in ({self.visual_tokens} visual), {self.cached_tokens} cached · {vision}"
            f"prefill {self.prefill_seconds * 1e3:.0f} ms · {self.new_tokens} tokens out{speed}"
        )


_ONE_CACHE = "a conversation has one cache, and one answer to a question: leave it out"
REFUSED_OF_CONVERSATIONS = {
    "num_beams": Refused(_ONE_CACHE, (1,)),
    "num_return_sequences": Refused(_ONE_CACHE, (1,)),
    "cache_implementation": Refused("a conversation keeps its own cache: leave it out"),
    "prompt_lookup_num_tokens": Refused(
        "transformers would feed the whole conversation again behind its cache in each turn: leave it out"
    ),
    "return_dict_in_generate": Refused("a session returns a Turn: leave it out", (False,)),
}
OWN_ARGUMENTS = {
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "past_key_values",
    "streamer",
    "images",
    "image_sizes",
    "generation_config",
    "position_ids",
    "token_sizes",
}


def answer_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` for an answer, greedy and of at most 512 tokens if they do not say otherwise.

    Raises:
        ValueError: an answer has no limit.
    """
    settings = {"max_new_tokens": 512, "do_sample": False, **given}
    if type(limit := settings["max_new_tokens"]) is not int or limit < 1:
        raise ValueError(f"max_new_tokens={limit!r}: an answer of a conversation needs a limit, give 1 or more")
    return settings


class Clock(BaseStreamer):
    """Passes tokens on and notes when the first and the last came (arriving on the host, they are synchronised)."""

    def __init__(self, inner: BaseStreamer | None) -> None:
        self.inner = inner
        self.start = self.first = self.last = time.perf_counter()
        self.fed = 0
        self._prompt_came = False
        self._counting = False

    def before_prefill(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note when the language model is given the prompt, and how long it is: its forward pre-hook."""
        if not self.fed:
            self.fed, self.start = kwargs["inputs_embeds"].shape[1], time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call, empty here) or a new token."""
        self.last = time.perf_counter()
        if self._prompt_came and not self._counting:
            self.first, self._counting = self.last, True
        self._prompt_came = True
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        """No more tokens."""
        if self.inner is not None:
            self.inner.end()

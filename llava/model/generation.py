"""Settings of transformers' ``generate`` for prompts that it is given as embeddings.

What it knows of such prompts is their width with padding; their ids it never sees. So what it does with a setting is
one of three things: the same as ever (most), something that has to be corrected here so that a row of a batch answers
as it would alone (lengths that count the prompt), or nothing sensible, which is refused by :data:`REFUSED`.
Penalties and n-grams count what is new; the prompt is not among their ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from visionzip.integrations.generation import setting


class Refused(NamedTuple):
    """A setting that is refused.

    Attributes:
        cure: why, and what to do instead.
        neutral: values besides None that switch it off.
        unless: an argument with which it is welcome all the same.
        only: the only values that are refused, if not all others.
    """

    cure: str
    neutral: tuple[Any, ...] = ()
    unless: str | None = None
    only: tuple[Any, ...] = ()


_NO_DRAFTS = "drafted tokens are checked against the prompt's ids, and images have none: leave it out"
_NO_IDS = "it compares with the prompt's ids, and images have none: leave it out"

REFUSED: dict[str, Refused] = {
    "assistant_model": Refused(_NO_DRAFTS),
    "assistant_early_exit": Refused(_NO_DRAFTS),
    "use_mtp": Refused(_NO_DRAFTS, (False,)),
    "encoder_repetition_penalty": Refused(_NO_IDS, (1.0,)),
    "encoder_no_repeat_ngram_size": Refused(_NO_IDS, (0,)),
    "forced_bos_token_id": Refused(
        "it is for models with a decoder of their own, and would force the second token of an answer: leave it out"
    ),
    "guidance_scale": Refused(
        "without negative_prompt_ids it starts from the prompt's last id, and the prompt is embeddings: give "
        "negative_prompt_ids (B, n), or leave it out",
        (1.0,),
        unless="negative_prompt_ids",
    ),
    "prefill_chunk_size": Refused("the prompt is embeddings, which transformers does not cut: leave it out"),
    "cache_implementation": Refused(
        "continuous batching takes ids alone, without images: use another, or leave it out", only=("paged",)
    ),
    "token_healing": Refused("the prompt's last token is not among what transformers sees: leave it out", (False,)),
}
"""What cannot be done with embeddings."""


def check_settings(refused: Mapping[str, Refused], model: Any, arguments: Mapping[str, Any]) -> None:
    """Check the settings of a call, from its arguments, its ``generation_config`` or the model's.

    Raises:
        ValueError: one is refused; the message names it and its value.
    """
    for name, (cure, neutral, unless, only) in refused.items():
        value = setting(name, model, arguments.get("generation_config"), arguments)
        if value is None or value in neutral or (unless is not None and arguments.get(unless) is not None):
            continue
        if only and value not in only:
            continue
        shown = value if isinstance(value, int | float | str | tuple) else type(value).__name__
        raise ValueError(f"{name}={shown} cannot be used here: {cure}")


def padding_id(model: Any, arguments: Mapping[str, Any]) -> int | None:
    """The id that can only be padding; None if there is none, or it also ends answers, so that it may be text."""
    config = arguments.get("generation_config")
    pad, end = (setting(f"{name}_token_id", model, config, arguments) for name in ("pad", "eos"))
    return None if pad in (end if isinstance(end, list) else [end]) else pad


def with_row_lengths(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` by which ``max_length`` and ``min_length`` count each row's own prompt.

    Transformers takes the width of ``inputs_embeds`` (B, L, D) from either, padding and all.

    Raises:
        ValueError: a prompt is as long as ``max_length``; or rows that differ in length want a length that cannot be
            theirs alone.
    """
    config = arguments.get("generation_config")

    def own(name: str) -> Any:
        return setting(name, model, config, arguments)

    longest = own("max_length") if own("max_new_tokens") is None else None
    least = own("min_length") if own("min_new_tokens") is None else None
    if not longest and not least:
        return arguments
    embeds, mask = arguments["inputs_embeds"], arguments.get("attention_mask")
    rows, width = embeds.shape[:2]
    counted = isinstance(mask, Tensor) and mask.shape == (rows, width)
    lengths = mask.sum(1).tolist() if counted else [width] * rows
    changes: dict[str, Any] = {}
    if longest:
        left = [longest - length for length in lengths]
        if min(left) < 1:
            row = left.index(min(left))
            raise ValueError(
                f"max_length={longest} counts the prompt, and prompt {row} has {lengths[row]} tokens with its images: "
                "give max_new_tokens, or a larger max_length"
            )
        if min(left) < max(left):
            alone = {"num_beams": (None, 1), "forced_eos_token_id": (None,)}
            if others := [name for name, values in alone.items() if own(name) not in values]:
                raise ValueError(
                    f"max_length={longest} counts the prompts, which have {min(lengths)} to {max(lengths)} tokens "
                    f"here, so that {others[0]} would end rows too early: give max_new_tokens"
                )
            changes["stopping_criteria"] = [*(arguments.get("stopping_criteria") or []), _RowLimits(left)]
        if max(left) + width != longest:
            changes["max_length"] = max(left) + width
    if least:
        wanted = sorted({max(least - length, 0) for length in lengths})
        if len(wanted) > 1:
            raise ValueError(
                f"min_length={least} counts the prompts, which have {min(lengths)} to {max(lengths)} tokens here, so "
                "that it would be another for each row: give min_new_tokens"
            )
        if wanted != [max(least - width, 0)]:
            changes["min_length"] = wanted[0] + width
    return arguments | changes


class _RowLimits(StoppingCriteria):
    """Ends each row after as many new tokens as it would have room for alone.

    Args:
        limits: of each prompt.
    """

    def __init__(self, limits: list[int]) -> None:
        self._limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._limits = self._limits.to(input_ids.device)
        copies = len(input_ids) // len(self._limits)
        return input_ids.shape[1] >= self._limits.repeat_interleave(copies)


def own_memory(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Forward pre-hook of the head: the last tokens' hidden states as a tensor of their own, not the prompt's slice.

    Given a slice in bf16, torch's CPU kernel copies the whole weight of the head: 150 ms for 2 at 32000 x 1024.
    """
    (hidden,) = args
    if hidden.stride(0) == hidden.shape[1:].numel():
        return None
    return (hidden.clone(memory_format=torch.contiguous_format),)

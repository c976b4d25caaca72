"""Continue original positions over several calls, from the positions of the tokens that a KV cache holds.

transformers numbers a token by how many tokens are before it. If visual tokens keep the positions that they have in the
uncompressed prompt, that number is too low for everything after them. So the positions of a cache's tokens are noted on
the cache, and later tokens count on from the highest one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzip.language.cache_notes import note, recall, with_own_cache

_NOTE = "_visionzip_positions"  # attribute of a KV cache: (B, P), the positions of its first P tokens


def check_positions(config: Any) -> None:
    """Check that a language model's attention kernel takes positions that jump.

    Args:
        config: the language model's config.

    Raises:
        ValueError: the kernel is flash attention, which takes each jump for the start of another prompt.
    """
    if "flash" in (kernel := str(config._attn_implementation)):
        raise ValueError(
            f"positions='original' leaves gaps, which attn_implementation={kernel!r} takes for the start of another "
            "prompt: load the model with attn_implementation='sdpa', or set positions='consecutive'"
        )


def next_positions(cache: Any, rows: int) -> Tensor | None:
    """Compute the position (B, 1) of the token that follows a KV cache, or None if all its positions are consecutive.

    Args:
        cache: transformers' ``Cache``, or None.
        rows: B, the rows of the tokens that come next.

    Raises:
        ValueError: the number of rows does not fit those of the cache.
    """
    noted = recall(cache, _NOTE, rows)
    if noted is None:
        return None
    return noted.amax(dim=1, keepdim=True) + 1 + int(cache.get_seq_length()) - noted.shape[1]


def with_positions(backbone: nn.Module, arguments: dict[str, Any], original: bool) -> dict[str, Any]:
    """Complete the arguments of a backbone's forward with ``position_ids`` that continue those of its cache.

    If the call has positions of its own, they are noted on the cache instead.

    Args:
        backbone: a text model of transformers.
        arguments: the arguments of its forward, by name.
        original: whether the call's positions may be original ones.

    Returns:
        The arguments, completed where necessary.

    Raises:
        ValueError: the number of rows does not fit those of the cache, or the attention kernel takes no gaps.
    """
    positions, cache = arguments.get("position_ids"), arguments.get("past_key_values")
    if positions is None and not hasattr(cache, _NOTE):
        return arguments
    embeds = arguments.get("inputs_embeds")
    given = arguments["input_ids"] if embeds is None else embeds
    rows, length = given.shape[:2]
    if positions is None:
        start = next_positions(cache, rows)
        if start is None:  # the cache was emptied
            return arguments
        return arguments | {"position_ids": start.to(given.device) + torch.arange(length, device=given.device)}
    if embeds is None or not original:  # a step of decoding adds 1 to positions that are noted already
        return arguments
    check_positions(backbone.config)
    arguments = with_own_cache(backbone, arguments)
    if (cache := arguments.get("past_key_values")) is not None:
        past = int(cache.get_seq_length())
        before = recall(cache, _NOTE, rows)
        if before is None:
            before = positions.new_zeros(rows, 0)
        between = torch.arange(past - before.shape[1], device=positions.device).expand(rows, -1)
        if before.shape[1]:
            between = between + before.amax(dim=1, keepdim=True).to(positions) + 1
        note(cache, _NOTE, torch.cat([before.to(positions), between, positions.expand(rows, -1)], dim=1))
    return arguments

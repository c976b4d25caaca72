"""Original positions over several calls: where a KV cache's tokens stand, so that what follows goes on behind them.

Transformers numbers tokens by how many are before them. Where visual tokens keep the positions that they would have if
all were there, that is too low for what is behind them; what a cache holds says better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzip.language.cache_notes import note, recall, with_own_cache

_NOTE = "_visionzip_positions"  # attribute of a KV cache: (B, P) positions of its first P tokens


def check_positions(config: Any) -> None:
    """Check that a language model's attention can have original positions.

    Args:
        config: of the language model.

    Raises:
        ValueError: it is flash attention, which takes each jump of positions for the start of another prompt.
    """
    if "flash" in (kernel := str(config._attn_implementation)):
        raise ValueError(
            f"positions='original' leave gaps, which attn_implementation={kernel!r} takes for the start of another "
            "prompt: load the model with attn_implementation='sdpa', or set positions='consecutive'"
        )


def next_positions(cache: Any, rows: int) -> Tensor | None:
    """The position (B, 1) behind the tokens of a KV cache; None if they are not noted, so that all are consecutive.

    Args:
        cache: transformers' ``Cache``, or None.
        rows: B.

    Raises:
        ValueError: the cache was filled by other rows.
    """
    noted = recall(cache, _NOTE, rows)
    if noted is None:
        return None
    return noted.amax(dim=1, keepdim=True) + 1 + int(cache.get_seq_length()) - noted.shape[1]


def with_positions(backbone: nn.Module, arguments: dict[str, Any], original: bool) -> dict[str, Any]:
    """The arguments of a backbone's forward, with ``position_ids`` behind those of the cache where the call has none.

    Positions that the call has are noted on the cache.

    Args:
        backbone: with a ``config`` as transformers' have it.
        arguments: by name.
        original: the call's positions may be original ones.

    Raises:
        ValueError: the cache was filled by other rows, or what :func:`check_positions` raises.
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
    if embeds is None or not original:  # a step of decoding, which goes on by one
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

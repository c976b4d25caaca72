"""What is known of the tokens in a KV cache besides their keys and values, noted on the cache itself.

So it goes where the cache goes, over later turns, beams and copies, and two conversations do not disturb each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache


def with_own_cache(backbone: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a backbone's forward with the KV cache that it would make itself, to note something on."""
    use_cache = arguments.get("use_cache")
    checkpointing = backbone.training and getattr(backbone, "gradient_checkpointing", False)
    wanted = backbone.config.use_cache if use_cache is None else use_cache
    if arguments.get("past_key_values") is not None or not wanted or checkpointing:
        return arguments
    return arguments | {"past_key_values": DynamicCache(config=backbone.config)}


def note(cache: Any, name: str, values: Tensor) -> None:
    """Note values (B, P) of a cache's first P tokens; nothing happens without a cache."""
    if cache is not None:
        setattr(cache, name, values)


def recall(cache: Any, name: str, rows: int, step: bool = False) -> Tensor | None:
    """Recall what was noted of a cache's tokens, corrected if it was cut, emptied or repeated since.

    Args:
        cache: transformers' ``Cache``, or None.
        name: as in :func:`note`.
        rows: B, of the tokens that come next.
        step: one token comes next: the length of a cache of static shape, which may be on a GPU, is then not waited
            for; values become 0 where it was emptied since. Compiled steps do not look.

    Returns:
        (B, P), or None if nothing is noted. Tokens behind the P-th came after the note.

    Raises:
        ValueError: the cache was noted for other rows than these.
    """
    noted: Tensor | None = getattr(cache, name, None)
    if noted is None:
        return None
    if step and cache.is_compileable:
        if not torch.compiler.is_compiling():
            noted = noted * (torch.as_tensor(cache.get_seq_length()) >= noted.shape[1]).to(noted.device)
            setattr(cache, name, noted)
    else:
        past = int(cache.get_seq_length())
        if past < noted.shape[1]:
            noted = noted[:, :past]
            setattr(cache, name, noted)
        if past == 0:
            delattr(cache, name)
            return None
    if rows % len(noted):
        raise ValueError(
            f"the KV cache holds {len(noted)} prompts with images, but {rows} rows follow: give the rows that it was "
            "filled with, or the whole conversation without it"
        )
    return noted.repeat_interleave(rows // len(noted), dim=0)

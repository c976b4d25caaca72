"""Note on a KV cache what is known about its tokens besides their keys and values, such as positions or sizes.

A note goes where the cache goes, through later turns, beams and copies. So conversations do not disturb each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache


def with_own_cache(backbone: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add to the arguments of a backbone's forward the KV cache that it would make itself, to note something on."""
    use_cache = arguments.get("use_cache")
    checkpointing = backbone.training and getattr(backbone, "gradient_checkpointing", False)
    wanted = backbone.config.use_cache if use_cache is None else use_cache
    if arguments.get("past_key_values") is not None or not wanted or checkpointing:
        return arguments
    return arguments | {"past_key_values": DynamicCache(config=backbone.config)}


def note(cache: Any, name: str, values: Tensor) -> None:
    """Note values (B, P) about a cache's first P tokens; without a cache, nothing happens."""
    if cache is not None:
        setattr(cache, name, values)


def recall(cache: Any, name: str, rows: int, step: bool = False) -> Tensor | None:
    """Recall what was noted about a cache's tokens, adapted if the cache was cropped, emptied or repeated since.

    Args:
        cache: transformers' ``Cache``, or None.
        name: the name under which :func:`note` noted it.
        rows: B, the rows of the tokens that come next.
        step: whether a single token comes next. Nothing then waits for the length of a cache of static shape, which may
            be on a GPU: if the cache was emptied, the values become 0. A compiled step does not check even that.

    Returns:
        (B, P), or None if nothing is noted. The cache may hold more than P tokens: those after the P-th came later.

    Raises:
        ValueError: the number of rows does not fit those of the note.
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

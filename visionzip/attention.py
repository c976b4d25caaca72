"""Reads the queries and keys of one encoder layer while it runs, and turns them into scores.

Fused attention kernels (sdpa, flash-attn) never form the attention matrix, and asking for it would send every layer
back to the eager kernel. VisionZip needs one row of it, in one layer: that row is computed here from the layer's own
projections, so that all layers keep their kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class QueriesKeys(NamedTuple):
    """Queries and keys of one attention layer, with bias, unscaled: each (B, H, S, Dh)."""

    queries: Tensor
    keys: Tensor
    scale: float


class AttentionReader:
    """Filled while the attention layer runs inside :func:`read_attention`."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._captured: dict[str, Tensor] = {}

    def result(self) -> QueriesKeys:
        """What the layer computed.

        Raises:
            RuntimeError: the layer has not run inside the ``with`` block.
        """
        if len(self._captured) < 2:
            raise RuntimeError("the attention layer has not run inside read_attention, so there is nothing to read")
        heads = self._attention.num_heads
        split = [self._captured[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj")]
        return QueriesKeys(*split, scale=self._attention.scale)


@contextmanager
def read_attention(attention: nn.Module) -> Iterator[AttentionReader]:
    """Record what one attention layer's query and key projections return during the ``with`` block.

    The hooks are on these two projections of this one module, only during the block, and listen to the calling thread
    only: neither another model nor another thread that runs the same model is affected. The projections are looked up
    at entry, so adapters (LoRA) or quantised layers that have replaced them are read as they are.

    Args:
        attention: module with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``, as transformers' CLIP and SigLIP
            attention layers have.

    Yields:
        An :class:`AttentionReader`; call its ``result()`` after the layer has run.

    Raises:
        TypeError: the module lacks one of the four attributes.
    """
    if missing := [name for name in ("q_proj", "k_proj", "num_heads", "scale") if not hasattr(attention, name)]:
        raise TypeError(f"{type(attention).__name__} is not an attention layer that can be read: it has no {missing}")
    reader = AttentionReader(attention)
    thread = threading.get_ident()

    def record(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if threading.get_ident() == thread:
                reader._captured[name] = output

        return hook

    handles = [getattr(attention, name).register_forward_hook(record(name)) for name in ("q_proj", "k_proj")]
    try:
        yield reader
    finally:
        for handle in handles:
            handle.remove()


def cls_attention(read: QueriesKeys) -> Tensor:
    """Softmax attention of the CLS query (position 0) on all positions.

    Args:
        read: queries and keys (B, H, S, Dh). Only the CLS query is used: the cost is H x 1 x S, not H x S x S.

    Returns:
        (B, H, S) in float32, the row that eager attention calls ``attentions[layer][:, :, 0]``.
    """
    return _attention(read.queries[:, :, :1], read)[:, :, 0]


def received_attention(read: QueriesKeys, block: int = 128) -> Tensor:
    """Attention that each position receives, averaged over all queries, for encoders without a CLS token (SigLIP).

    Args:
        read: queries and keys (B, H, S, Dh).
        block: queries at a time, so that no more than (B, H, block, S) is ever stored.

    Returns:
        (B, H, S) in float32: the mean over the query axis of the eager attention matrix.
    """
    length = read.queries.shape[2]
    total = sum(_attention(queries, read).sum(dim=2) for queries in read.queries.split(block, dim=2))
    return total / length


def patch_scores(read: QueriesKeys, cls_token: bool) -> Tensor:
    """Score of each patch (DESIGN, section 4): attention summed over heads.

    Returns:
        (B, N) in float32; N = S - 1 with a CLS token (its own score is left out), else S.
    """
    return cls_attention(read).sum(dim=1)[:, 1:] if cls_token else received_attention(read).sum(dim=1)


def merge_keys(read: QueriesKeys) -> Tensor:
    """Keys averaged over heads, in float32, by which contextual tokens are matched: (B, S, Dh)."""
    return read.keys.float().mean(dim=1)


def _attention(queries: Tensor, read: QueriesKeys) -> Tensor:
    # float32 even for half-precision models: in bf16 a quarter of the 576 scores would tie (released.md, item 12).
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries.float() @ read.keys.float().transpose(2, 3)
        return (logits * read.scale).softmax(dim=-1)

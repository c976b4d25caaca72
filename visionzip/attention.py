"""Reads the queries and keys of one encoder layer while it runs, and turns them into scores.

Fused attention kernels (sdpa, flash-attn) never form the attention matrix, and asking for it would send every layer
back to the eager kernel. VisionZip needs one row of it, in one layer: that row is computed here from the layer's own
projections, so that all layers keep their kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")
_SEPARATE, _FUSED = ("q_proj", "k_proj"), ("qkv_proj",)  # transformers' layers have these, vLLM's that


class QueriesKeys(NamedTuple):
    """Queries and keys of one attention layer, with bias, unscaled: each (B, H, S, Dh)."""

    queries: Tensor
    keys: Tensor
    scale: float


class AttentionReader(Generic[T]):
    """Filled while the attention layer runs inside :func:`read_attention`."""

    def __init__(self, attention: nn.Module, projections: tuple[str, ...], reduce: Callable[[QueriesKeys], T]) -> None:
        self._attention = attention
        self._projections = projections
        self._reduce = reduce
        self._captured: dict[str, Tensor] = {}
        self._result: T | None = None

    def record(self, name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        """Take one projection's output, (B, S, H * Dh) or fused (B, S, 3 * H * Dh); the last one makes the result.

        vLLM's projections return a tuple, of which the output is the first.
        """
        # Scores and keys only choose tokens: no gradient flows through them, and with gradient checkpointing there must
        # be nothing here for it to save.
        self._captured[name] = (output[0] if isinstance(output, tuple) else output).detach()
        if len(self._captured) == len(self._projections):
            outputs = [self._captured.pop(name) for name in self._projections]
            pair = outputs if len(outputs) == 2 else outputs[0].chunk(3, dim=-1)[:2]
            split = [each.unflatten(-1, (self._attention.num_heads, -1)).transpose(1, 2) for each in pair]
            self._result = self._reduce(QueriesKeys(*split, scale=self._attention.scale))

    def result(self) -> T:
        """What ``reduce`` made of the layer's queries and keys.

        Raises:
            RuntimeError: the layer has not run inside the ``with`` block.
        """
        if self._result is None:
            raise RuntimeError("the attention layer has not run inside read_attention, so there is nothing to read")
        return self._result


def _unreduced(read: QueriesKeys) -> QueriesKeys:
    return read


@contextmanager
def read_attention(
    attention: nn.Module, reduce: Callable[[QueriesKeys], T] = _unreduced
) -> Iterator[AttentionReader[T]]:
    """Record what one attention layer's query and key projections return during the ``with`` block.

    The hooks are on these projections of this one module, only during the block, and listen to the calling thread
    only: neither another model nor another thread that runs the same model is affected. The projections are looked up
    at entry, so adapters (LoRA) or quantised layers that have replaced them are read as they are.

    Args:
        attention: module with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``, as transformers' CLIP and SigLIP
            attention layers have; or with ``qkv_proj`` in the place of the two, as vLLM's have.
        reduce: applied at once, inside the layer, so that the queries and keys need not outlive it; as they are if not
            given.

    Yields:
        An :class:`AttentionReader`; call its ``result()`` after the layer has run.

    Raises:
        TypeError: the module lacks one of these attributes.
    """
    projections = _FUSED if hasattr(attention, *_FUSED) else _SEPARATE
    needed = (*projections, "num_heads", "scale")
    if missing := [name for name in needed if not hasattr(attention, name)]:
        raise TypeError(f"{type(attention).__name__} is not an attention layer that can be read: it has no {missing}")
    reader = AttentionReader(attention, projections, reduce)
    thread = threading.get_ident()

    def listen(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                reader.record(name, output)

        return getattr(attention, name).register_forward_hook(hook)

    handles = [listen(name) for name in projections]
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
    """Attention that each position receives, averaged over all queries.

    For encoders without a CLS token, such as SigLIP (the paper's Algorithm 3).

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
    """Score of each patch: attention summed over heads (the paper's Algorithm 1; 3 without CLS).

    Args:
        read: queries and keys (B, H, S, Dh) of the scored layer.
        cls_token: position 0 is a CLS token, whose attention is the score; else the attention received is.

    Returns:
        (B, N) in float32; N = S - 1 with a CLS token (its own score is left out), else S.
    """
    return cls_attention(read).sum(dim=1)[:, 1:] if cls_token else received_attention(read).sum(dim=1)


def merge_keys(read: QueriesKeys) -> Tensor:
    """Keys averaged over heads, by which contextual tokens are matched (released code).

    Args:
        read: queries and keys (B, H, S, Dh) of the scored layer.

    Returns:
        (B, S, Dh) in float32.
    """
    return read.keys.float().mean(dim=1)


def _attention(queries: Tensor, read: QueriesKeys) -> Tensor:
    # float32 even for half-precision models: of 576 scores in bf16, 423 were distinct in a recorded case.
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries.float() @ read.keys.float().transpose(2, 3)
        return (logits * read.scale).softmax(dim=-1)

"""Reads the queries and keys of one encoder layer while it runs, and turns them into scores.

Fused attention kernels (sdpa, flash-attn) never form the attention matrix, and asking for it would send every layer
back to the eager kernel. VisionZip needs one row of it, in one layer: that row is computed here from the layer's own
projections, so that all layers keep their kernel.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")
_SEPARATE, _FUSED = ("q_proj", "k_proj"), ("qkv_proj",)  # transformers' layers have these, vLLM's that
_NORMS = ("q_norm", "k_norm")  # behind these, in layers that have them (InternVL's)


class QueriesKeys(NamedTuple):
    """Queries and keys of one attention layer, with bias, unscaled: each (B, H, S, Dh)."""

    queries: Tensor
    keys: Tensor
    scale: float


class AttentionReader(Generic[T]):
    """Filled while the attention layer runs inside :func:`read_attention`."""

    def __init__(self, attention: nn.Module, names: tuple[str, ...], reduce: Callable[[QueriesKeys], T]) -> None:
        self._attention = attention
        self._names = names
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
        if len(self._captured) == len(self._names):
            outputs = [self._captured.pop(name) for name in self._names]
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
            attention layers have; where it normalises what these return, by ``q_norm`` and ``k_norm``, that is read.
            Or with ``qkv_proj`` in the place of the two, as vLLM's have.
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
    names = _NORMS if projections == _SEPARATE and all(hasattr(attention, name) for name in _NORMS) else projections
    reader = AttentionReader(attention, names, reduce)
    thread = threading.get_ident()

    def listen(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                reader.record(name, output)

        return getattr(attention, name).register_forward_hook(hook)

    handles = [listen(name) for name in names]
    try:
        yield reader
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def read_parts(
    attention: nn.Module, names: tuple[str, ...], reduce: Callable[[dict[str, Tensor], dict[str, Any]], T]
) -> Iterator[list[T]]:
    """Record what parts of one attention layer return, and with which arguments the layer was called.

    The hooks are as those of :func:`read_attention`. For layers that rotate queries and keys behind their projections:
    what they rotate by is among the arguments.

    Args:
        attention: the layer.
        names: its parts.
        reduce: of what these returned, by name, and of the arguments; applied behind the layer.

    Yields:
        A list that gets what ``reduce`` returns.
    """
    thread, found, captured = threading.get_ident(), [], {}

    def listen(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if threading.get_ident() == thread:
                captured[name] = output.detach()

        return getattr(attention, name).register_forward_hook(hook)

    def behind(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() == thread:
            found.append(reduce(captured, kwargs))
            captured.clear()

    handles = [*map(listen, names), attention.register_forward_hook(behind, with_kwargs=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def read_packed_attention(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what patches of packed images receive in one attention layer with rotary positions, as Qwen-VL's have.

    Images lie one behind the other in one sequence of S patches and attend within ``cu_seqlens``.

    Args:
        attention: module with ``qkv``, ``num_heads`` and ``scaling``, called with ``cu_seqlens`` and
            ``position_embeddings``; its rotation is ``apply_rotary_pos_emb_vision`` beside its class.

    Yields:
        A list that gets what :func:`packed_scores` returns.
    """
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb_vision")  # noqa: B009

    def score(outputs: dict[str, Tensor], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        queries, keys, _ = outputs["qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)  # (S, H, Dh)
        turned = rotate(queries, keys, *given["position_embeddings"])
        lengths = given["cu_seqlens"].diff().tolist()
        return packed_scores(*(values.transpose(0, 1) for values in (*turned, keys)), lengths, attention.scaling)

    with read_parts(attention, ("qkv",), score) as found:
        yield found


def packed_scores(
    queries: Tensor, keys: Tensor, unturned: Tensor, lengths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Score the patches of packed images, each image alone, in blocks of queries.

    Args:
        queries: (H, S, Dh), rotated.
        keys: likewise.
        unturned: keys before rotation: what a patch is like, not where it is.
        lengths: patches of each image.
        scale: of the layer's attention.

    Returns:
        (S,) float32, attention received, summed over heads, mean over the image's queries; and (S, Dh) float32, keys
        before rotation, mean over heads.
    """
    images = zip(*(values[None].split(lengths, dim=2) for values in (queries, keys)), strict=True)
    scores = [patch_scores(QueriesKeys(*image, scale), cls_token=False)[0] for image in images]
    return torch.cat(scores), unturned.float().mean(dim=0)


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


def patch_attention(read: QueriesKeys, cls_token: bool, block: int = 128) -> Tensor:
    """Attention of each patch on each patch, mean over heads.

    Args:
        read: queries and keys (B, H, S, Dh).
        cls_token: position 0 is a CLS token, which is left out on both sides.
        block: queries at a time, so that no more than (B, H, block, S) is stored of single heads.

    Returns:
        (B, N, N) in float32: row i is what patch i pays; it sums to 1 less what a CLS token gets.
    """
    first = int(cls_token)
    queries = read.queries[:, :, first:].split(block, dim=2)
    return torch.cat([_attention(some, read).mean(dim=1) for some in queries], dim=1)[:, :, first:]


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

"""Read the queries and keys of one encoder layer while it runs, and compute the patches' scores from them.

Fused attention kernels (sdpa, flash-attn) never form the attention matrix, and a model that is asked for it runs the
eager kernel in every layer. VisionZip needs one row of the matrix of one layer. The hooks here read that layer's own
projections and compute the row, so that all layers keep their kernel.
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
_SEPARATE, _FUSED = ("q_proj", "k_proj"), ("qkv_proj",)  # projections of transformers' layers, and of vLLM's
_NORMS = ("q_norm", "k_norm")  # some layers (InternVL's) normalise queries and keys after the projections


class QueriesKeys(NamedTuple):
    """Queries and keys of one attention layer, each (B, H, S, Dh), with bias and unscaled, and the layer's scale."""

    queries: Tensor
    keys: Tensor
    scale: float


class AttentionReader(Generic[T]):
    """Collect what an attention layer projects inside :func:`read_attention`, and hold what is made of it."""

    def __init__(self, attention: nn.Module, names: tuple[str, ...], reduce: Callable[[QueriesKeys], T]) -> None:
        self._attention = attention
        self._names = names
        self._reduce = reduce
        self._captured: dict[str, Tensor] = {}
        self._result: T | None = None

    def record(self, name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        """Take one projection's output; once all are there, reduce them to the result.

        Args:
            name: of the projection.
            output: (B, S, H * Dh), or (B, S, 3 * H * Dh) of a fused one. vLLM's projections return a tuple, whose first
                entry this is.
        """
        # Scores and keys only choose tokens: no gradient flows through them, and with gradient checkpointing there must
        # be nothing here for it to save.
        self._captured[name] = (output[0] if isinstance(output, tuple) else output).detach()
        if len(self._captured) == len(self._names):
            outputs = [self._captured.pop(name) for name in self._names]
            pair = outputs if len(outputs) == 2 else outputs[0].chunk(3, dim=-1)[:2]
            queries, keys = (each.unflatten(-1, (self._attention.num_heads, -1)).transpose(1, 2) for each in pair)
            self._result = self._reduce(QueriesKeys(queries, keys, self._attention.scale))

    def result(self) -> T:
        """Return what ``reduce`` made of the layer's queries and keys.

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
    attention: nn.Module,
    reduce: Callable[[QueriesKeys], T] = _unreduced,  # type: ignore[assignment]  # T is QueriesKeys by default
) -> Iterator[AttentionReader[T]]:
    """Record the queries and keys of one attention layer that runs during the ``with`` block.

    The hooks hang on this one module's projections, only during the block, and they listen to the calling thread only,
    so neither another model nor another thread that runs the same model is affected. The projections are looked up at
    entry, so adapters (LoRA) and quantised layers that have replaced them are read as well.

    Args:
        attention: a module with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``, such as the attention layers of
            transformers' CLIP and SigLIP; or with ``qkv_proj`` in place of the first two, such as vLLM's. Of a module
            that normalises queries and keys by ``q_norm`` and ``k_norm``, the normalised ones are read.
        reduce: computes the result from the queries and keys inside the layer, so that these are freed at once. By
            default they are the result themselves.

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
    """Record what submodules of one attention layer return, and the arguments that the layer is called with.

    This is for layers that rotate queries and keys after their projections: the rotation is among the arguments. The
    hooks are as careful as those of :func:`read_attention`.

    Args:
        attention: the layer.
        names: the names of its submodules.
        reduce: computes the result from the submodules' outputs, by name, and the layer's arguments, by name. It is
            called as soon as the layer has run.

    Yields:
        A list, to which each run of the layer appends the result.
    """
    thread = threading.get_ident()
    found: list[T] = []
    captured: dict[str, Tensor] = {}

    def listen(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                captured[name] = (output[0] if isinstance(output, tuple) else output).detach()

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


def packed_scores(
    queries: Tensor, keys: Tensor, unrotated: Tensor, lengths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Score the patches of packed images, each image alone.

    Args:
        queries: (H, S, Dh), the rotated queries.
        keys: (H, S, Dh), the rotated keys.
        unrotated: (H, S, Dh), the keys before the rotation, which tell what a patch is like and not where it is.
        lengths: how many patches each image has.
        scale: the scale of the layer's attention.

    Returns:
        The scores (S,) float32, as :func:`patch_scores` computes them without a CLS token; and the keys (S, Dh) float32
        before the rotation, mean over heads.
    """
    by_image = zip(queries[None].split(lengths, dim=2), keys[None].split(lengths, dim=2), strict=True)
    scores = [patch_scores(QueriesKeys(*image, scale), cls_token=False)[0] for image in by_image]
    return torch.cat(scores), unrotated.float().mean(dim=0)


@contextmanager
def read_packed_attention(attention: nn.Module, reduce: Callable[..., Any] = packed_scores) -> Iterator[list[Any]]:
    """Record the scores and keys of packed images in one layer with rotary positions, such as Qwen-VL's.

    Packed images lie one behind the other in one sequence of S patches, and each attends only to its own part of it,
    which ``cu_seqlens`` delimits.

    Args:
        attention: a module with ``qkv``, ``num_heads`` and ``scaling`` that is called with ``cu_seqlens`` and
            ``position_embeddings``, and whose class has ``apply_rotary_pos_emb_vision`` beside it in its module.
        reduce: makes something else of the arguments of :func:`packed_scores`.

    Yields:
        A list, to which each run of the layer appends what ``reduce`` returns.
    """
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb_vision")  # noqa: B009

    def score(outputs: dict[str, Tensor], given: dict[str, Any]) -> Any:
        split = outputs["qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)  # three of (S, H, Dh)
        queries, keys = rotate(split[0], split[1], *given["position_embeddings"])
        lengths = given["cu_seqlens"].diff().tolist()
        return reduce(
            queries.transpose(0, 1), keys.transpose(0, 1), split[1].transpose(0, 1), lengths, attention.scaling
        )

    with read_parts(attention, ("qkv",), score) as found:
        yield found


def cls_attention(read: QueriesKeys) -> Tensor:
    """Compute the attention that the CLS token (position 0) pays to every position.

    Only the query of the CLS token is used, so that the cost is H x 1 x S and not H x S x S.

    Args:
        read: queries and keys (B, H, S, Dh).

    Returns:
        (B, H, S) float32, which is ``attentions[layer][:, :, 0]`` of a model with eager attention.
    """
    return _attention(read.queries[:, :, :1], read)[:, :, 0]


def received_attention(read: QueriesKeys, block: int = 128) -> Tensor:
    """Compute the attention that every position receives, mean over all queries, for encoders without a CLS token.

    Args:
        read: queries and keys (B, H, S, Dh).
        block: how many queries to compute at a time, so that no more than (B, H, block, S) is ever stored.

    Returns:
        (B, H, S) float32, which is ``attentions[layer].mean(dim=2)`` of a model with eager attention.
    """
    total = torch.zeros_like(read.queries[..., 0], dtype=torch.float32)
    for queries in read.queries.split(block, dim=2):
        total += _attention(queries, read).sum(dim=2)
    return total / read.queries.shape[2]


def patch_attention(read: QueriesKeys, cls_token: bool, block: int = 128) -> Tensor:
    """Compute the attention that each patch pays to each patch, mean over heads.

    Args:
        read: queries and keys (B, H, S, Dh).
        cls_token: whether position 0 is a CLS token, which is left out on both sides.
        block: how many queries to compute at a time, so that no more than (B, H, block, S) of single heads is stored.

    Returns:
        (B, N, N) float32: row i is what patch i pays, and sums to 1 minus what it pays to a CLS token.
    """
    first = int(cls_token)
    queries = read.queries[:, :, first:].split(block, dim=2)
    return torch.cat([_attention(some, read).mean(dim=1) for some in queries], dim=1)[:, :, first:]


def patch_scores(read: QueriesKeys, cls_token: bool) -> Tensor:
    """Compute the dominant score of each patch, by which VisionZip keeps tokens.

    With queries q and keys k of the scored layer, which has H heads of d channels, the score of patch i is::

        with a CLS token        s_i = sum over heads h of softmax_j(q_CLS . k_j / sqrt(d))[i]
        without (SigLIP)        s_i = sum over heads h of mean over queries p of softmax_j(q_p . k_j / sqrt(d))[i]

    Source: the paper's S_h = softmax(Q_h K_h^T / sqrt(D_h)), its row of the CLS token in Algorithm 1, its mean over
    queries in Algorithm 3. Like the released code this sums over heads; the paper's S_avg is their mean, which ranks
    patches in the same order.

    Args:
        read: queries and keys (B, H, S, Dh) of the scored layer.
        cls_token: whether position 0 is a CLS token.

    Returns:
        (B, N) float32; N = S - 1 with a CLS token, which gets no score itself, otherwise N = S.
    """
    return cls_attention(read).sum(dim=1)[:, 1:] if cls_token else received_attention(read).sum(dim=1)


def merge_keys(read: QueriesKeys) -> Tensor:
    """Average the keys over heads; their cosine decides which tokens are merged (released code).

    Args:
        read: queries and keys (B, H, S, Dh) of the scored layer.

    Returns:
        (B, S, Dh) float32.
    """
    return read.keys.float().mean(dim=1)


def _attention(queries: Tensor, read: QueriesKeys) -> Tensor:
    # float32 even for half-precision models: of 576 scores in bf16, 423 were distinct in a recorded case.
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries.float() @ read.keys.float().transpose(2, 3)
        return (logits * read.scale).softmax(dim=-1)

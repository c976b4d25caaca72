"""The method itself: pure functions on tensors, with no module state.

Everything here is batched and has shapes that depend on the arguments' shapes only, never on their values: no Python
loop over images or tokens, no boolean mask, no transfer to the host. That is what ``torch.compile(fullgraph=True)`` and
CUDA graphs need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.config import MergeRule, VisionZipConfig


class CompressedTokens(NamedTuple):
    """What :func:`compress_tokens` returns, for B images of S tokens: K dominant and M contextual tokens each.

    Attributes:
        tokens: (B, K+M, D), dominant tokens in the order of the sequence, then the contextual ones.
        dominant_indices: (B, K) int64, ascending positions in the sequence; the CLS token (position 0) is included.
        target_indices: (B, M) int64, ascending position of each contextual token's target.
        assignment: (B, S) int64, slot 0..M-1 of the contextual token that each position went into (a target goes into
            its own), -1 for dominant positions. With M = 0 all are -1: the rest is dropped.
        sizes: (B, K+M) float32, patches that each token stands for in the language model's attention; None where the
            setting has no ``size_bias``.
    """

    tokens: Tensor
    dominant_indices: Tensor
    target_indices: Tensor
    assignment: Tensor
    sizes: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """(B, K+M) int64, the position that each token keeps: its own, or its target's."""
        return torch.cat([self.dominant_indices, self.target_indices], dim=1)


def compress_tokens(
    hidden_states: Tensor,
    scores: Tensor,
    keys: Tensor,
    dominant: int,
    contextual: int,
    *,
    cls_token: bool = True,
    merge: MergeRule = "released",
) -> CompressedTokens:
    """Keep the tokens that attention concentrates on and merge the rest (VisionZip, arXiv 2412.04467).

    The dominant tokens are the CLS token and the ``dominant - 1`` patches of highest score; equal scores resolve to the
    lower index. Of the R tokens that remain, in order, every ``max(1, R // contextual)``-th is a target, the first
    ``contextual`` of them; each other one joins the target whose key is most similar (cosine; a key of norm zero is
    equally similar to all and joins the first). Scores and similarities are compared in float32 or better (in TF32
    where you have allowed that for matrix products), whatever the input's type and whether autocast is on; the result
    is differentiable with respect to ``hidden_states``.

    Source: the paper's Algorithm 1 (3 without a CLS token) for the dominant tokens, the released code for the others.

    Args:
        hidden_states: (B, S, D) output of the scored encoder layer.
        scores: (B, N) attention on each patch; N = S - 1 with a CLS token, else S.
        keys: (B, S, Dk) keys of that layer, averaged over heads.
        dominant: K, tokens to keep, at least 1; counts the CLS token.
        contextual: M, tokens to merge the rest into, at least 0.
        cls_token: position 0 is a CLS token: it has no score and is always kept.
        merge: see :class:`VisionZipConfig`.

    Returns:
        :class:`CompressedTokens`. With K + M >= S nothing is compressed: all S tokens come back as they were, in order,
        and all count as dominant.

    Raises:
        ValueError: the shapes do not fit together, or a count is below its limit.
    """
    VisionZipConfig(dominant=dominant, contextual=contextual, merge=merge)  # checks the three
    _check_shapes(hidden_states, scores, keys, cls_token)
    batch, length, _ = hidden_states.shape
    device = hidden_states.device

    if dominant + contextual >= length:
        everything = torch.arange(length, device=device).expand(batch, length)
        return CompressedTokens(
            tokens=hidden_states,
            dominant_indices=everything,
            target_indices=everything[:, :0],
            assignment=torch.full_like(everything, -1),
        )

    dominant_indices, rest = _split(scores, dominant, length, cls_token)
    kept = _gather_tokens(hidden_states, dominant_indices)
    assignment = torch.full((batch, length), -1, device=device)
    if contextual == 0:
        return CompressedTokens(kept, dominant_indices, rest[:, :0], assignment)

    step = max(1, rest.shape[1] // contextual)
    target_indices = rest[:, : contextual * step : step]
    slots = _assign(keys, rest, target_indices, step)
    assignment = assignment.scatter(1, rest, slots)
    merged = _merge(hidden_states, assignment, target_indices, merge)
    return CompressedTokens(torch.cat([kept, merged], dim=1), dominant_indices, target_indices, assignment)


def compress_alike(hidden_states: Tensor, chosen: CompressedTokens, merge: MergeRule) -> Tensor:
    """Keep and merge another layer's tokens as those of one were.

    Args:
        hidden_states: (B, S, D) of the same S tokens.
        chosen: what was kept and merged.
        merge: see :class:`VisionZipConfig`.

    Returns:
        (B, K+M, D), in the order of ``chosen.tokens``.
    """
    kept = _gather_tokens(hidden_states, chosen.dominant_indices)
    if not chosen.target_indices.shape[1]:
        return kept
    return torch.cat([kept, _merge(hidden_states, chosen.assignment, chosen.target_indices, merge)], dim=1)


def group_sizes(keys: Tensor, kept: Tensor, cls_token: bool) -> Tensor:
    """Count the patches that each kept token stands for: itself, and the dropped ones that are most like it.

    A dropped patch counts for the kept one whose key is most similar (cosine; the first where equal). A CLS token
    stands for no patch: it counts 1, and no other counts for it, unless it is all that is kept.

    Args:
        keys: (B, S, Dk), keys of the sequence, averaged over heads.
        kept: (B, T) int64 positions that the tokens keep.
        cls_token: position 0 is a CLS token.

    Returns:
        (B, T) float32, each at least 1; a row's sum is N, or N + 1 with a CLS token that is kept.
    """
    batch, length, _ = keys.shape
    with torch.autocast(keys.device.type, enabled=False):
        unit = F.normalize(_at_least_float32(keys), dim=-1)
        similarity = unit @ _gather_tokens(unit, kept).mT  # (B, S, T)
    if cls_token:
        similarity = similarity.masked_fill((kept == 0)[:, None], -2.0)
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    member = similarity.argmax(dim=-1).scatter(1, kept, own)
    counted = torch.ones(batch, length, device=keys.device)
    if cls_token:  # one that was dropped is no patch of anyone's
        counted[:, 0] = (kept == 0).any(dim=1).float()
    return counted.new_zeros(kept.shape).scatter_add(1, member, counted)


def _check_shapes(hidden_states: Tensor, scores: Tensor, keys: Tensor, cls_token: bool) -> None:
    if hidden_states.ndim != 3 or hidden_states.shape[0] == 0:
        raise ValueError(f"hidden_states must be (B, S, D) with B >= 1, got {tuple(hidden_states.shape)}")
    batch, length, _ = hidden_states.shape
    expected = (batch, length - int(cls_token))
    if tuple(scores.shape) != expected:
        with_or_without = "with" if cls_token else "without"
        raise ValueError(f"scores must be {expected} {with_or_without} a CLS token, got {tuple(scores.shape)}")
    if keys.ndim != 3 or tuple(keys.shape[:2]) != (batch, length):
        raise ValueError(f"keys must be ({batch}, {length}, Dk), got {tuple(keys.shape)}")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def _split(scores: Tensor, dominant: int, length: int, cls_token: bool) -> tuple[Tensor, Tensor]:
    """Positions of the dominant tokens (B, K) and of the rest (B, S-K), both ascending."""
    # A stable sort, not topk: topk leaves the order of equal scores to the device.
    ranking = _at_least_float32(scores).sort(dim=1, descending=True, stable=True).indices
    chosen = ranking[:, : dominant - int(cls_token)] + int(cls_token)
    if cls_token:
        chosen = F.pad(chosen, (1, 0), value=0)
    is_dominant = torch.zeros(scores.shape[0], length, dtype=torch.int32, device=scores.device).scatter(1, chosen, 1)
    # One stable sort of the flags lists the rest (0) and then the dominant tokens (1), each in ascending order.
    order = is_dominant.sort(dim=1, stable=True).indices
    return order[:, length - dominant :], order[:, : length - dominant]


def _assign(keys: Tensor, rest: Tensor, target_indices: Tensor, step: int) -> Tensor:
    """Slot of each remaining token (B, R): its own for a target, that of the most similar target for the others."""
    with torch.autocast(keys.device.type, enabled=False):
        unit = F.normalize(_at_least_float32(keys), dim=-1)
        similarity = _gather_tokens(unit, rest) @ _gather_tokens(unit, target_indices).transpose(1, 2)
    nearest = similarity.argmax(dim=-1)
    position = torch.arange(rest.shape[1], device=rest.device)
    is_target = (position % step == 0) & (position < step * target_indices.shape[1])
    return torch.where(is_target, position // step, nearest)


def _merge(hidden_states: Tensor, assignment: Tensor, target_indices: Tensor, merge: MergeRule) -> Tensor:
    """Contextual tokens (B, M, D), as one product of weights (B, M, S) with the hidden states.

    A product, not a scatter: it is deterministic on a GPU too, and its sum runs in float32.
    """
    values = _at_least_float32(hidden_states)
    slot = torch.arange(target_indices.shape[1], device=assignment.device)[:, None]
    members = (assignment[:, None, :] == slot).to(values.dtype)
    if merge == "average":
        weights = members / members.sum(dim=-1, keepdim=True)
    else:
        position = torch.arange(assignment.shape[1], device=assignment.device)
        targets = (target_indices[..., None] == position).to(values.dtype)
        assigned = members - targets
        weights = targets + assigned / assigned.sum(dim=-1, keepdim=True).clamp(min=1)
    with torch.autocast(values.device.type, enabled=False):
        return (weights @ values).to(hidden_states.dtype)

"""VisionZip itself on tensors: keep the dominant tokens, merge the others into contextual tokens.

The functions are pure and batched, and the shapes of their results follow from the shapes of their arguments, never
from values: there is no Python loop over images or tokens, no boolean mask and no transfer to the host. That is what
``torch.compile(fullgraph=True)`` and CUDA graphs need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.config import MergeRule, VisionZipConfig


class CompressedTokens(NamedTuple):
    """The K dominant and M contextual tokens of each of B images, and where in its sequence of S tokens they come from.

    Attributes:
        tokens: (B, K+M, D), the dominant tokens in the order of the sequence, then the contextual tokens.
        dominant_indices: (B, K) int64, the ascending positions of the dominant tokens; a kept CLS token is position 0.
        target_indices: (B, M) int64, the ascending positions of the targets, one for each contextual token.
        assignment: (B, S) int64, for each position the contextual token (0 to M - 1) that it is merged into; a target
            is merged into its own. Dominant and dropped positions have -1, so with M = 0 all have -1.
        sizes: (B, K+M) float32, how many patches each token stands for in the language model's attention; None if the
            setting has no ``size_bias``.
    """

    tokens: Tensor
    dominant_indices: Tensor
    target_indices: Tensor
    assignment: Tensor
    sizes: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """(B, K+M) int64, the position in the sequence of each dominant token and of each contextual token's target."""
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
    """Keep the tokens that attention concentrates on and merge the others (VisionZip, arXiv 2412.04467).

    1. **Dominant tokens.** The CLS token and the K - 1 patches of highest score are kept (K patches without a CLS
       token). :func:`visionzip.attention.patch_scores` has the formula of the score. Equal scores resolve to the lower
       index.
    2. **Targets.** R = S - K tokens remain, in the order of the sequence. With ``step = max(1, R // M)``, the targets
       t_1 … t_M are the remaining tokens 0, step, 2 step, …, (M - 1) step.
    3. **Assignment.** Each other remaining token i joins the target whose key is most similar to its own,
       ``argmax_m cos(k_i, k_{t_m})``; equal similarities resolve to the first target.
    4. **Merge.** With A_m the tokens that joined target t_m and h the hidden states, contextual token m is::

           merge="released"    h_{t_m} + (1 / |A_m|) * sum of h_i over i in A_m        (h_{t_m} if A_m is empty)
           merge="average"     (h_{t_m} + sum of h_i over i in A_m) / (1 + |A_m|)

    Scores and similarities are compared in float32 or better (in TF32 if you have allowed that for matrix products),
    whatever the input's type is and whether or not autocast is on. A key of norm zero has similarity 0 to every target.
    The result is differentiable with respect to ``hidden_states``.

    Source: the paper's Algorithm 1 (Algorithm 3 without a CLS token) for step 1; its product of K_merge and K_target^T
    for step 3, with the released code's keys; the released code for step 2 and ``"released"``, which differs from the
    paper's ``avg_merge``, ``"average"``.

    Args:
        hidden_states: (B, S, D), the output of the scored encoder layer.
        scores: (B, N), the attention on each patch; N = S - 1 with a CLS token, otherwise N = S.
        keys: (B, S, Dk), the keys of that layer, averaged over heads.
        dominant: K, how many tokens to keep, at least 1; it counts the CLS token.
        contextual: M, how many tokens to merge the others into, at least 0; with 0 the others are dropped.
        cls_token: whether position 0 is a CLS token, which has no score and is always kept.
        merge: the formula of step 4.

    Returns:
        The chosen tokens. With K + M >= S nothing is compressed: all S tokens come back unchanged and in order, and all
        count as dominant.

    Raises:
        ValueError: the shapes do not fit together, a count is below its limit, or ``merge`` is unknown.
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
    """Apply a choice that was made on one layer's hidden states to another layer's.

    Args:
        hidden_states: (B, S, D), the other layer's hidden states of the same S tokens.
        chosen: which tokens are kept, and which are merged into which.
        merge: the formula of the merge, as in :func:`compress_tokens`.

    Returns:
        (B, K+M, D), in the order of ``chosen.tokens``.
    """
    kept = _gather_tokens(hidden_states, chosen.dominant_indices)
    if not chosen.target_indices.shape[1]:
        return kept
    return torch.cat([kept, _merge(hidden_states, chosen.assignment, chosen.target_indices, merge)], dim=1)


def group_sizes(keys: Tensor, kept: Tensor, cls_token: bool) -> Tensor:
    """Count the patches that each kept token stands for: its own patch, and the dropped ones that are most like it.

    A dropped patch is counted to the kept token whose key is most similar (cosine; the first of equal ones). A kept CLS
    token has size 1: dropped patches are counted to it only if no other token is kept.

    Args:
        keys: (B, S, Dk), the keys of all tokens, averaged over heads.
        kept: (B, T) int64, the positions of the kept tokens (:attr:`CompressedTokens.kept`).
        cls_token: whether position 0 is a CLS token.

    Returns:
        (B, T) float32, each at least 1. A row sums to N patches, or to N + 1 if the CLS token is kept.
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
    if cls_token:  # a dropped CLS token is no patch, so no kept token stands for it
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
    """Find the positions of the dominant tokens (B, K) and of the others (B, S-K), both ascending."""
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
    """Number the contextual token (B, R) that each remaining token joins: steps 2 and 3 of :func:`compress_tokens`."""
    with torch.autocast(keys.device.type, enabled=False):
        unit = F.normalize(_at_least_float32(keys), dim=-1)
        similarity = _gather_tokens(unit, rest) @ _gather_tokens(unit, target_indices).transpose(1, 2)
    nearest = similarity.argmax(dim=-1)
    position = torch.arange(rest.shape[1], device=rest.device)
    is_target = (position % step == 0) & (position < step * target_indices.shape[1])
    return torch.where(is_target, position // step, nearest)


def _merge(hidden_states: Tensor, assignment: Tensor, target_indices: Tensor, merge: MergeRule) -> Tensor:
    """Merge into the contextual tokens (B, M, D): step 4 of :func:`compress_tokens`, which has both formulas.

    They are weighted sums over the sequence, so they are one product of weights (B, M, S) with the hidden
    states. Unlike a scatter, that is deterministic on a GPU too, and it accumulates in float32.
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

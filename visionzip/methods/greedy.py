"""Choosing patches one by one, each by what the ones before it leave uncovered.

All images of a batch are chosen for at once. A step is a few operations on (B, N) values: the N x N similarities are
computed once, in one product. Nothing is moved to the host, and shapes follow from shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_similarity(features: Tensor, *, centred: bool = False) -> Tensor:
    """Compute the cosine of each pair of tokens: (B, N, N) float32 of features (B, N, D).

    Args:
        features: in any floating type; one of norm zero has cosine 0 with all.
        centred: subtract each image's mean feature first.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.detach().float()
        if centred:
            features = features - features.mean(dim=1, keepdim=True)
        unit = F.normalize(features, dim=-1)
        return unit @ unit.mT


def loneliest(similarity: Tensor) -> Tensor:
    """Find the token (B,) whose nearest neighbour is farthest, of (B, N, N); the lower index where equal."""
    own = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    return (1 - similarity.masked_fill(own, -torch.inf).amax(dim=-1)).argmax(dim=1)


def row_of(matrix: Tensor, chosen: Tensor) -> Tensor:
    """Take the row (B, N) of each image's chosen token (B,) out of (B, N, N)."""
    return matrix.gather(1, chosen[:, None, None].expand(-1, 1, matrix.shape[2]))[:, 0]


def choose_greedily(
    state: Tensor,
    count: int,
    score: Callable[[Tensor], Tensor],
    update: Callable[[Tensor, Tensor], Tensor],
    first: Tensor | None = None,
) -> Tensor:
    """Choose K tokens one after the other, each the best by what is known when it is chosen.

    Args:
        state: (B, N) what is known before the first choice.
        count: K, at least 1.
        score: state to (B, N), what each token is worth now; the highest is chosen, the lower index where equal.
        update: ``(state, chosen) -> state``, called with the token (B,) that was just chosen.
        first: (B,) the token to begin with, if it is not the best by ``score``.

    Returns:
        (B, K) int64 in the order of choice, no token twice.
    """
    chosen: list[Tensor] = []
    taken = torch.zeros(state.shape, dtype=torch.bool, device=state.device)
    for step in range(count):
        given = first if step == 0 else None
        best = score(state).masked_fill(taken, -torch.inf).argmax(dim=1) if given is None else given
        chosen.append(best)
        if step < count - 1:
            taken = taken.scatter(1, best[:, None], True)
            state = update(state, best)
    return torch.stack(chosen, dim=1)


def farthest_first(similarity: Tensor, count: int, first: Tensor, weight: Tensor | None = None) -> Tensor:
    """Choose K tokens, each the one of largest (weighted) distance 1 - cosine to the nearest one chosen before it.

    Args:
        similarity: (B, N, N) cosines.
        count: K.
        first: (B,) the token to begin with.
        weight: (B, N) at least 0, by which distances are multiplied; all 1 if not given.

    Returns:
        (B, K) int64 in the order of choice.
    """
    nearest = torch.full(similarity.shape[:2], torch.inf, device=similarity.device)

    def score(nearest: Tensor) -> Tensor:
        return nearest if weight is None else weight * nearest

    def update(nearest: Tensor, chosen: Tensor) -> Tensor:
        return torch.minimum(nearest, (1 - row_of(similarity, chosen)).clamp(min=0))

    return choose_greedily(nearest, count, score, update, first)

"""Choosing patches one by one, each by what the ones before it leave uncovered.

All images of a batch are chosen for at once, on their device. What each choice does to the worth of the others is
computed for all of them beforehand, as one (B, N, N) table: a step is then three kernels (take a row, minimum, argmax),
and two when compiled. Nothing is moved to the host, and shapes follow from shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.methods.base import finite

# A step is compiled once, not K times: of 640 steps in 5 to 20 s instead of 4 min. Not there before torch 2.8.
compiled_once = getattr(torch.compiler, "nested_compile_region", lambda step: step)


def cosine_similarity(features: Tensor, *, centred: bool = False) -> Tensor:
    """Compute the cosine of each pair of tokens: (B, N, N) float32 of features (B, N, D).

    Args:
        features: in any floating type; one of norm zero has cosine 0 with all, and so has one of NaN.
        centred: subtract each image's mean feature first.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = finite(features)
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


def choose_greedily(worth: Tensor, limits: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """Choose K tokens one after the other, each the one of highest worth when it is chosen.

    Args:
        worth: (B, N) above -inf, what each token is worth before the first choice; the lower index where equal.
        limits: (B, N, N) above -inf: once token i is chosen, token j is worth at most ``limits[:, i, j]``. Changed in
            place.
        count: K, 1 to N.
        first: (B,) the token to begin with, if it is not the one of highest worth.

    Returns:
        (B, K) int64 in the order of choice, no token twice.
    """
    limits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # what is chosen is worth nothing: no mask is needed
    chosen = [worth.argmax(dim=1) if first is None else first]
    for _ in range(count - 1):
        worth, best = _step(worth, limits, chosen[-1])
        chosen.append(best)
    return torch.stack(chosen, dim=1)


@compiled_once
def _step(worth: Tensor, limits: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Lower the worth of each token to its limit by the last one chosen, and choose the best: (B, N) and (B,)."""
    worth = torch.minimum(worth, row_of(limits, last))
    return worth, worth.argmax(dim=1)


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
    distance = (1 - similarity).clamp_(min=0)
    if weight is not None:  # the smallest of the products is the product with the smallest
        distance *= weight[:, None]
    return choose_greedily(distance.new_full(distance.shape[:2], torch.inf), distance, count, first)

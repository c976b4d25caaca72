"""Choose patches one by one, each by how little the ones before it resemble it.

The patches of all images of a batch are chosen together, on their device. A (B, N, N) table, computed once, says how
far each choice lowers the worth of every other patch. A step is then three kernels (take a row, minimum, argmax), or
two when compiled. Nothing is moved to the host, and shapes follow from shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.methods.base import finite

# A step is compiled once and not K times: 640 steps compile in 5 to 20 s and not in 4 min. torch has this since 2.8.
compiled_once = getattr(torch.compiler, "nested_compile_region", lambda step: step)


def cosine_similarity(features: Tensor, *, centred: bool = False) -> Tensor:
    """Compute the cosine of each pair of tokens: (B, N, N) float32 from features (B, N, D).

    Args:
        features: (B, N, D) in any floating type; a feature of norm zero, or of NaN, has cosine 0 with all.
        centred: whether each image's mean feature is subtracted first.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = finite(features)
        if centred:
            features = features - features.mean(dim=1, keepdim=True)
        unit = F.normalize(features, dim=-1)
        return unit @ unit.mT


def loneliest(similarity: Tensor) -> Tensor:
    """Find the token (B,) whose nearest neighbour is farthest, by (B, N, N); equal ones resolve to the lower index."""
    own = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    return (1 - similarity.masked_fill(own, -torch.inf).amax(dim=-1)).argmax(dim=1)


def row_of(matrix: Tensor, chosen: Tensor) -> Tensor:
    """Take the row (B, N) of each image's chosen token (B,) from (B, N, N)."""
    return matrix.gather(1, chosen[:, None, None].expand(-1, 1, matrix.shape[2]))[:, 0]


def choose_greedily(worth: Tensor, limits: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """Choose K tokens one after the other: each time the one that is worth most; equal ones resolve to the lower index.

    Args:
        worth: (B, N) above -inf, what each token is worth before the first choice.
        limits: (B, N, N) above -inf: once token i is chosen, token j is worth at most ``limits[:, i, j]``. The table is
            changed in place.
        count: K, 1 to N.
        first: (B,), the token to begin with; None begins with the one that is worth most.

    Returns:
        (B, K) int64 in the order of choice, no token twice.
    """
    limits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # a chosen token is worth -inf, so no mask is needed
    chosen = [worth.argmax(dim=1) if first is None else first]
    for _ in range(count - 1):
        worth, best = _step(worth, limits, chosen[-1])
        chosen.append(best)
    return torch.stack(chosen, dim=1)


@compiled_once
def _step(worth: Tensor, limits: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Lower the worth (B, N) of each token to the limit that the last choice sets, and choose the best (B,)."""
    worth = torch.minimum(worth, row_of(limits, last))
    return worth, worth.argmax(dim=1)


def farthest_first(similarity: Tensor, count: int, first: Tensor, weight: Tensor | None = None) -> Tensor:
    """Choose K tokens, each the one whose distance (1 - cosine) to the nearest chosen token is largest.

    Args:
        similarity: (B, N, N) cosines.
        count: K.
        first: (B,), the token to begin with.
        weight: (B, N), at least 0; the distances of each token are multiplied by its weight. None stands for 1.

    Returns:
        (B, K) int64 in the order of choice.
    """
    distance = (1 - similarity).clamp_(min=0)
    if weight is not None:  # w * min(d) = min(w * d) for w >= 0, so the table may hold the products
        distance *= weight[:, None]
    return choose_greedily(distance.new_full(distance.shape[:2], torch.inf), distance, count, first)

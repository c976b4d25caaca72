"""Cen-Prune (2026): DivPrune on centred features, with distances weighted by how distinct each patch is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import cosine_similarity, farthest_first, loneliest


def distinctiveness(features: Tensor) -> Tensor:
    """Compute how distinct each token is, 0 to 1 in each image: (B, N) from features (B, N, D).

    The value is minus the mean cosine to the other tokens, scaled so that the image's smallest is 0 and its largest 1;
    if all are equal, all are 1. The sum of cosines to the others is the product with the sum of their unit features,
    which costs O(N D) and not O(N^2 D).
    """
    unit = F.normalize(finite(features), dim=-1)
    values = -(unit * (unit.sum(dim=1, keepdim=True) - unit)).sum(dim=-1)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-12)).where(high - low > 1e-12, 1.0)


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Choose as DivPrune does, with distances of centred features multiplied by :func:`distinctiveness`."""
    similarity = cosine_similarity(read.projected, centred=True)
    weight = distinctiveness(read.projected)
    return kept_patches(read, farthest_first(similarity, counts.dominant, loneliest(similarity), weight))


METHOD = Method(
    "cen-prune",
    "as divprune, on centred features, times how distinct each patch is",
    choose,
    frozenset({"projected"}),
    "Cen-Prune, 2026 preprint",
)

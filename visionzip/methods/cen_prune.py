"""Cen-Prune (2026): DivPrune on centred features, times how distinct a patch is before centring."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import cosine_similarity, farthest_first, loneliest


def distinctiveness(features: Tensor) -> Tensor:
    """Scale minus the mean cosine of each token to the others to 0..1 per image: (B, N) of features (B, N, D).

    The mean over the other tokens orders them as minus the cosine to the sum of all unit features does, which costs
    O(N D). Where all are equally distinct, all have 1.
    """
    unit = F.normalize(finite(features), dim=-1)
    values = -(unit * (unit.sum(dim=1, keepdim=True) - unit)).sum(dim=-1)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-12)).where(high - low > 1e-12, 1.0)


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Choose as DivPrune does, by centred distance times :func:`distinctiveness`."""
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

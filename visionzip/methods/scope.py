"""SCOPE (NeurIPS 2025, arXiv 2510.24214): patches that cover the others, weighted by attention."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, kept_patches
from visionzip.methods.greedy import choose_greedily, cosine_similarity, row_of

ALPHA = 1.0  # exponent of attention in the released scripts


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Add, K times, the patch of highest attention times the similarity to the others that it adds."""
    similarity = cosine_similarity(read.patches)
    saliency = read.scores.float() ** ALPHA

    def score(covered: Tensor) -> Tensor:
        return (similarity - covered[:, None, :]).clamp(min=0).sum(dim=-1) * saliency

    def update(covered: Tensor, chosen: Tensor) -> Tensor:
        return torch.maximum(covered, row_of(similarity, chosen))

    nothing = torch.zeros_like(saliency)
    return kept_patches(read, choose_greedily(nothing, counts.dominant, score, update))


METHOD = Method(
    "scope",
    "patches that add most similarity to the others, times their attention",
    choose,
    frozenset({"scores"}),
    "SCOPE, arXiv 2510.24214",
)

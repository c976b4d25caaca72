"""DivPrune (CVPR 2025, arXiv 2503.02175): keep the patches that differ most from each other."""

from __future__ import annotations

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, kept_patches
from visionzip.methods.greedy import cosine_similarity, farthest_first, loneliest


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Begin with the patch whose nearest neighbour is farthest; K - 1 times, add the one farthest from those chosen."""
    similarity = cosine_similarity(read.projected)
    return kept_patches(read, farthest_first(similarity, counts.dominant, loneliest(similarity)))


METHOD = Method(
    "divprune",
    "patches whose smallest distance to each other is largest, behind the projector",
    choose,
    frozenset({"projected"}),
    "DivPrune, arXiv 2503.02175",
)

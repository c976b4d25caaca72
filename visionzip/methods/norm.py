"""Keep the patches of largest norm behind the projector: the plainest choice that reads no attention."""

from __future__ import annotations

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, top_patches


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Keep the K patches of largest norm."""
    return top_patches(read, read.projected.detach().float().norm(dim=-1), counts.dominant)


METHOD = Method(
    "norm",
    "patches of largest norm behind the projector",
    choose,
    frozenset({"projected"}),
    "what ZOO-Prune's estimate tracks (CVPR 2026)",
)

"""VisionZip-plus, this repository's own: patches that are attended to and differ, where they were, by their size.

It is put together of what others have shown. Choosing one after the other by the smallest distance to those chosen is
DivPrune's (arXiv 2503.02175), on centred features Cen-Prune's (2026 preprint); the original positions are RESTORE's,
and so is the size of the group that a token stands for as an addition to its attention logits, which goes back to the
proportional attention of ToMe (arXiv 2210.09461). New is how they are put together: the distance is weighted by CLS
attention to a small power, which keeps the small object that a distance passes over and starves nothing of the rest;
nothing is merged and no CLS token kept; and sizes are counted by the keys of the scored layer. ``docs/plus.md`` has
what each part adds on scenes, which is no evidence about other models.
"""

from __future__ import annotations

from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import cosine_similarity, farthest_first

ALPHA = 0.25  # exponent of attention, looked for on seed 101 of scenes alone


def attention_weight(scores: Tensor) -> Tensor:
    """Attention (B, N) as a share of each image's largest, to the power of :data:`ALPHA`: 0 to 1."""
    scores = finite(scores)
    return (scores / scores.amax(dim=1, keepdim=True).clamp(min=1e-12)) ** ALPHA


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Begin with the patch of most attention; add, K - 1 times, the one of largest weighted distance to those chosen.

    The distance is 1 minus the cosine of projected features from which the image's mean is subtracted, to the nearest
    of the chosen patches; equal ones resolve to the lower index.
    """
    similarity = cosine_similarity(read.projected, centred=True)
    first = read.scores.argmax(dim=1)
    return kept_patches(read, farthest_first(similarity, counts.dominant, first, attention_weight(read.scores)))


METHOD = Method(
    "visionzip-plus",
    "patches of large distance times attention, at their own positions, weighted by size",
    choose,
    frozenset({"scores", "projected"}),
    "this repository, after Cen-Prune, DivPrune, RESTORE and ToMe",
    positions="original",
    size_bias=True,
)

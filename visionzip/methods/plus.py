"""VisionZip-plus, this repository's own method: diverse patches that are attended to, at their original positions.

It combines parts that others have published. DivPrune (arXiv 2503.02175) chooses patches one by one by their distance
to those already chosen, and Cen-Prune (2026 preprint) does so on centred features. RESTORE keeps the original positions
and adds the size of the group that a token stands for to its attention logits, as ToMe's proportional attention does
(arXiv 2210.09461). The combination is new: the distance is weighted by CLS attention to a small power, so that a small
object that the distance alone passes over is kept, and the rest of the image still gets tokens; nothing is merged, and
no CLS token is kept; and sizes are counted by the keys of the scored layer. ``docs/measured/plus.md`` measures what
each part adds on the scenes; that is no evidence about other models.
"""

from __future__ import annotations

from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import cosine_similarity, farthest_first

ALPHA = 0.25  # exponent of the attention, tuned on the scenes of seed 101 only


def attention_weight(scores: Tensor) -> Tensor:
    """Compute (a_i / max a) ** :data:`ALPHA` of the attention a (B, N) on each image's patches: 0 to 1."""
    scores = finite(scores)
    return (scores / scores.amax(dim=1, keepdim=True).clamp(min=1e-12)) ** ALPHA


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Begin with the patch of most attention; K - 1 times, add the one of largest weighted distance to those chosen.

    With c_i the projected patch minus the image's mean, the weighted distance of patch i to the set of those chosen is
    ``w_i * min over chosen s of (1 - cos(c_i, c_s))``, and w_i is :func:`attention_weight`. Equal distances resolve to
    the lower index.
    """
    similarity = cosine_similarity(read.projected, centred=True)
    first = read.scores.argmax(dim=1)
    return kept_patches(read, farthest_first(similarity, counts.dominant, first, attention_weight(read.scores)))


METHOD = Method(
    "visionzip-plus",
    "diverse patches of high attention, at their original positions, weighted by size",
    choose,
    frozenset({"scores", "projected"}),
    "this repository, after Cen-Prune, DivPrune, RESTORE and ToMe",
    positions="original",
    size_bias=True,
)

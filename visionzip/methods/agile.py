"""AgilePruner (ICLR 2026, arXiv 2603.01236): by attention, dropping what resembles a kept patch."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import choose_greedily, cosine_similarity

STEP = 0.01  # of the threshold, for each place in the order of attention
HIGHEST = 0.5  # threshold, a cosine distance
# The paper divides by the mean effective rank over its data. As a share of the patches, that of the first 200 scenes of
# seed 101 in the embedded model's tower is 0.080 (11.5 of 144); other encoders will have another one.
MEAN_RANK = 0.08


def effective_rank(features: Tensor) -> Tensor:
    """Compute exp of the entropy of each image's normalised singular values: (B,) of features (B, N, D)."""
    with torch.autocast(features.device.type, enabled=False):
        gram = finite(features)
        gram = gram @ gram.mT if gram.shape[1] <= gram.shape[2] else gram.mT @ gram
        singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(dim=-1).exp()


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Walk the patches by attention: keep one, pass over those nearer to it than its threshold.

    The threshold grows along the order, faster in images of many different patches. Where fewer than K are left, those
    that were passed over follow, by attention.
    """
    patches = read.patches
    similarity = cosine_similarity(patches)
    place = read.scores.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    richness = effective_rank(patches) / (MEAN_RANK * patches.shape[1])
    threshold = ((place + 1) * richness[:, None] * STEP).clamp(max=HIGHEST)

    worth = -place.float()
    near = 1 - similarity <= threshold[..., None]
    behind = worth - place.shape[1]  # all others: so are those that are passed over
    limits = torch.where(near, behind[:, None], worth[:, None])
    return kept_patches(read, choose_greedily(worth, limits, counts.dominant))


METHOD = Method(
    "agile",
    "patches by attention, without those that resemble one already kept",
    choose,
    frozenset({"scores"}),
    "AgilePruner, arXiv 2603.01236",
)

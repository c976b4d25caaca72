"""AgilePruner (ICLR 2026, arXiv 2603.01236): keep patches by attention, but none that resembles a kept one."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import choose_greedily, cosine_similarity

STEP = 0.01  # how much the threshold grows from one patch to the next in the order of attention
HIGHEST = 0.5  # the largest threshold, a cosine distance
# The paper divides by the mean effective rank over its data. In the embedded model's tower, the mean over the first 200
# scenes of seed 101 is 11.5 of 144 patches, a share of 0.080; other encoders will have another share.
MEAN_RANK = 0.08


def effective_rank(features: Tensor) -> Tensor:
    """Compute the exponential of the entropy of the normalised singular values: (B,) from features (B, N, D)."""
    with torch.autocast(features.device.type, enabled=False):
        gram = finite(features)
        gram = gram @ gram.mT if gram.shape[1] <= gram.shape[2] else gram.mT @ gram
        singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(dim=-1).exp()


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Go through the patches by attention: keep one, and pass over those that are nearer to it than its threshold.

    The threshold of the n-th patch in that order is ``min(HIGHEST, n * STEP * richness)``, where the richness of an
    image is its effective rank over the mean one, so that images of many different patches are thinned more. If fewer
    than K patches are kept that way, those that were passed over are added by attention.
    """
    patches = read.patches
    similarity = cosine_similarity(patches)
    place = read.scores.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    richness = effective_rank(patches) / (MEAN_RANK * patches.shape[1])
    threshold = ((place + 1) * richness[:, None] * STEP).clamp(max=HIGHEST)

    worth = -place.float()
    near = 1 - similarity <= threshold[..., None]
    behind = worth - place.shape[1]  # a patch that is passed over ranks behind all that are not
    limits = torch.where(near, behind[:, None], worth[:, None])
    return kept_patches(read, choose_greedily(worth, limits, counts.dominant))


METHOD = Method(
    "agile",
    "patches by attention, without those that resemble one already kept",
    choose,
    frozenset({"scores"}),
    "AgilePruner, arXiv 2603.01236",
)

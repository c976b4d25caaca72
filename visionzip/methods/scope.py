"""SCOPE (NeurIPS 2025, arXiv 2510.24214): keep patches that are similar to the others and attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import compiled_once, cosine_similarity, row_of

ALPHA = 1.0  # exponent of the attention in the released scripts
RENEWED = 32  # gains that the CPU computes at a time


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Add, K times, the patch of highest gain: its attention times the similarity that it adds.

    Each patch j is covered by its largest similarity to a chosen patch, at first 0. Patch i then adds the sum over j of
    ``max(0, cos(i, j) - covered_j)``.
    """
    similarity = cosine_similarity(read.patches)
    saliency = finite(read.scores) ** ALPHA
    # The lazy step asks the host how long to go on: other devices would wait for that, and a graph would break.
    step = _step if similarity.device.type != "cpu" or torch.compiler.is_compiling() else _step_lazily
    covered = torch.zeros_like(saliency)
    worth = _worth(similarity, saliency, covered)
    chosen = [worth.argmax(dim=1)]
    for _ in range(counts.dominant - 1):
        covered = torch.maximum(covered, row_of(similarity, chosen[-1]))
        worth = step(worth.scatter(1, chosen[-1][:, None], -torch.inf), similarity, saliency, covered)
        chosen.append(worth.argmax(dim=1))
    return kept_patches(read, torch.stack(chosen, dim=1))


def _worth(similarity: Tensor, saliency: Tensor, covered: Tensor) -> Tensor:
    """Compute the gain (B, P) of patches from their similarities (B, P, N) to all patches, covered so far by (B, N)."""
    return (similarity - covered[:, None]).clamp_(min=0).sum(dim=-1) * saliency


@compiled_once
def _step(worth: Tensor, similarity: Tensor, saliency: Tensor, covered: Tensor) -> Tensor:
    """Compute the gain (B, N) of every patch anew. Gains never grow, and chosen patches stay at -inf."""
    return torch.minimum(worth, _worth(similarity, saliency, covered))


def _step_lazily(worth: Tensor, similarity: Tensor, saliency: Tensor, covered: Tensor) -> Tensor:
    """Compute gains (B, N) anew only for as many of the best patches as decide which one is the best.

    Gains only fall as more is covered, in floating point too, so an earlier gain is an upper bound. A patch whose bound
    is below another patch's present gain need not be computed; it keeps its bound.
    """
    old = worth > 0  # bounds that this step has not renewed; a bound of 0 cannot fall
    while True:
        bound, best = worth.where(old, -torch.inf).topk(min(RENEWED, worth.shape[1]), dim=1)
        if not (bound[:, 0] >= worth.where(~old, -torch.inf).amax(dim=1)).logical_and(bound[:, 0] > 0).any():
            return worth
        rows = similarity.gather(1, best[..., None].expand(-1, -1, similarity.shape[2]))
        now = _worth(rows, saliency.gather(1, best), covered)
        worth = worth.scatter(1, best, now.where(bound > -torch.inf, worth.gather(1, best)))
        old = old.scatter(1, best, False)


METHOD = Method(
    "scope",
    "patches that add most similarity to the others, times their attention",
    choose,
    frozenset({"scores"}),
    "SCOPE, arXiv 2510.24214",
)

"""SCOPE (NeurIPS 2025, arXiv 2510.24214): patches that cover the others, weighted by attention."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, finite, kept_patches
from visionzip.methods.greedy import compiled_once, cosine_similarity, row_of

ALPHA = 1.0  # exponent of attention in the released scripts
RENEWED = 32  # worths at a time, on the CPU


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Add, K times, the patch of highest attention times the similarity to the others that it adds."""
    similarity = cosine_similarity(read.patches)
    saliency = finite(read.scores) ** ALPHA
    # Other devices would have to wait for the host in each step, and a graph would break.
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
    """Compute what patches (B, P) with these similarities (B, P, N) to all add to what is covered (B, N) of them."""
    return (similarity - covered[:, None]).clamp_(min=0).sum(dim=-1) * saliency


@compiled_once
def _step(worth: Tensor, similarity: Tensor, saliency: Tensor, covered: Tensor) -> Tensor:
    """Compute what every patch is worth now, which is never more than before: (B, N); those at -inf stay there."""
    return torch.minimum(worth, _worth(similarity, saliency, covered))


def _step_lazily(worth: Tensor, similarity: Tensor, saliency: Tensor, covered: Tensor) -> Tensor:
    """Compute what the best patches are worth now, as many as decide which is the best: (B, N), the others as before.

    Worth only falls as more is covered, in floating point too, so what was computed earlier is an upper bound: a patch
    need not be looked at while its bound is below what another one is worth.
    """
    old = worth > 0  # bounds not computed in this step; one of 0 has nowhere to fall
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

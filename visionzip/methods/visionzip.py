"""VisionZip itself (CVPR 2025, arXiv 2412.04467), and what is left of it without one of its parts."""

from __future__ import annotations

import torch.nn.functional as F

from visionzip.compress import CompressedTokens, compress_tokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts

PAPER = "VisionZip, arXiv 2412.04467"


def split(tokens: int) -> tuple[int, int]:
    """Split T tokens into K dominant (CLS included) and M contextual ones in the paper's ratio of 27 to 5.

    M is T * 5 / 32, halves rounded up: 64 is 54 + 10, 48 is 40 + 8, 16 is 13 + 3. Source: the paper's budgets.
    """
    contextual = (10 * tokens + 32) // 64
    return tokens - contextual, contextual


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Keep the tokens that attention concentrates on and merge the rest: :func:`visionzip.compress_tokens`."""
    return compress_tokens(
        read.hidden_states,
        read.scores,
        read.keys,
        counts.dominant,
        counts.contextual,
        cls_token=read.cls_token,
        merge=config.merge,
    )


def choose_without_cls(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Choose among the patches alone, as if there were no CLS token; positions are still those of the sequence."""
    first = int(read.cls_token)
    compressed = compress_tokens(
        read.patches,
        read.scores,
        read.keys[:, first:],
        counts.dominant,
        counts.contextual,
        cls_token=False,
        merge=config.merge,
    )
    return compressed._replace(
        dominant_indices=compressed.dominant_indices + first,
        target_indices=compressed.target_indices + first,
        assignment=F.pad(compressed.assignment, (first, 0), value=-1),
    )


METHOD = Method(
    "visionzip",
    "K dominant tokens (CLS included) and M contextual ones, 27 to 5",
    choose,
    frozenset({"scores", "keys"}),
    PAPER,
    split,
    keeps_cls=True,
)
DOMINANT_ONLY = Method(
    "dominant-only",
    "ablation: dominant tokens (CLS included), the rest dropped",
    choose,
    frozenset({"scores", "keys"}),
    PAPER,
    lambda tokens: (tokens, 0),
    keeps_cls=True,
)
CONTEXTUAL_ONLY = Method(
    "contextual-only",
    "ablation: CLS and T - 1 contextual tokens",
    choose,
    frozenset({"scores", "keys"}),
    PAPER,
    lambda tokens: (1, tokens - 1),
    keeps_cls=True,
)
NO_CLS = Method(
    "no-cls",
    "ablation: as visionzip, with one more patch in the place of CLS",
    choose_without_cls,
    frozenset({"scores", "keys"}),
    PAPER,
    split,
)

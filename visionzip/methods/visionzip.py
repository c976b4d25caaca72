"""VisionZip (CVPR 2025, arXiv 2412.04467), and ablations that lack one of its parts."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from visionzip.compress import CompressedTokens, compress_tokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts


def split(tokens: int) -> tuple[int, int]:
    """Split T tokens into K dominant (CLS included) and M contextual ones in the ratio 27 : 5 of the paper's budgets.

    M is 5 T / 32, with halves rounded up: 64 is split into 54 + 10, 48 into 40 + 8, 16 into 13 + 3.
    """
    contextual = (10 * tokens + 32) // 64
    return tokens - contextual, contextual


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Keep the tokens that attention concentrates on and merge the others, by :func:`visionzip.compress_tokens`."""
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
    """Choose among the patches alone, as if there were no CLS token; positions still count it."""
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
    "VisionZip, arXiv 2412.04467",
    split,
    keeps_cls=True,
)
DOMINANT_ONLY = replace(
    METHOD,
    name="dominant-only",
    summary="ablation: dominant tokens (CLS included), the rest dropped",
    split=lambda tokens: (tokens, 0),
)
CONTEXTUAL_ONLY = replace(
    METHOD,
    name="contextual-only",
    summary="ablation: CLS and T - 1 contextual tokens",
    split=lambda tokens: (1, tokens - 1),
)
NO_CLS = replace(
    METHOD,
    name="no-cls",
    summary="ablation: as visionzip, with one more patch in the place of CLS",
    choose=choose_without_cls,
    keeps_cls=False,
)

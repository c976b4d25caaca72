"""Compute what the merged tokens of an encoder pay to each other, from what its patches pay."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from visionzip.attention import QueriesKeys, patch_attention


def packed_attention(queries: Tensor, keys: Tensor, unrotated: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Compute what each patch of one packed picture pays to each, mean over heads, for an encoder's ``pairs``.

    Args:
        queries: (H, S, Dh), as in :func:`visionzip.attention.packed_scores`, like the others.
        keys: the keys.
        unrotated: not needed.
        lengths: one number, S.
        scale: of the attention.

    Returns:
        (S, S) float32.

    Raises:
        ValueError: there are several pictures.
    """
    if len(lengths) != 1:
        raise ValueError(f"pairs are computed of one picture, but the inputs have {len(lengths)}: give one")
    return patch_attention(QueriesKeys(queries[None], keys[None], scale), cls_token=False)[0]


def of_tokens(pool: Callable[[Tensor], Tensor], pairs: Tensor, patches: int) -> Tensor:
    """Convert what patches pay to patches, (..., S, S), to what tokens pay to tokens, (..., N, N).

    Args:
        pool: averages values (..., S, C) of patches over those of each token, to (..., N, C).
        pairs: what patch i pays to patch j.
        patches: how many a token stands for.
    """
    return patches * pool(pool(pairs).mT).mT

"""Patch info mining (Mini-Gemini, arXiv 2403.18814, section 3.2): each visual token looks closer at its own patch.

Pure functions on tensors. A token of the low-resolution tower asks, with one attention head, the *sub-patches* that the
high-resolution tower has where the token's patch is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sub_patches(maps: Sequence[Tensor], corners: Tensor, size: int, pooled: int = 1) -> Tensor:
    """What the high-resolution tower has at some patches, of all its stages.

    As if all maps were scaled up to the first one's size (bilinear, as the released code does) and joined; only the
    positions that are asked for are computed.

    Args:
        maps: (B, C_k, h_k, w_k) of each stage, the finest first.
        corners: (B, N, 2) int64, row and column of each patch's first position in the first map.
        size: positions along an edge of a patch in the first map.
        pooled: positions along an edge that are averaged into one sub-patch; divides ``size``.

    Returns:
        (B, N, P, C): P = (size / pooled)^2 sub-patches of each patch, row by row; C is the sum of all C_k. In the maps'
        type.
    """
    batch, patches, _ = corners.shape
    height, width = maps[0].shape[-2:]
    step = torch.arange(size, device=corners.device)
    rows = (corners[..., :1] + step).view(batch, patches, size, 1).expand(-1, -1, -1, size)
    columns = (corners[..., 1:] + step).view(batch, patches, 1, size).expand_as(rows)
    # Centres of the positions, -1 to 1 across the whole image, which are the same for every map.
    points = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)

    def sample(stage: Tensor) -> Tensor:
        mode = "nearest" if stage.shape[-2:] == (height, width) else "bilinear"
        # In float32, as the released code interpolates. Past the outermost centres the outermost value holds.
        found = F.grid_sample(
            stage.float(), points.flatten(1, 2), mode=mode, padding_mode="border", align_corners=False
        )
        found = found.unflatten(2, (patches, size))
        if pooled > 1:
            cells = found.unflatten(4, (-1, pooled)).unflatten(3, (-1, pooled))
            found = cells.mean(dim=(4, 6))
        return found.flatten(3).movedim(1, -1).to(stage.dtype)

    return torch.cat([sample(stage) for stage in maps], dim=-1)


def mine(
    tokens: Tensor,
    candidates: Tensor,
    query_projector: nn.Sequential,
    aux_projector: nn.Sequential,
    val_projector: nn.Sequential,
) -> Tensor:
    """What each token reads from its sub-patches: attention with one head (the paper's equation 1).

    The key and value projections are linear, so they are applied to the one query and to the one mixture of a token
    instead of to each of its sub-patches (64 in the released models): the same numbers for a 64th of the work.

    Args:
        tokens: (B, N, D) of the low-resolution tower.
        candidates: (B, N, P, C) sub-patches of each.
        query_projector: layer norm and linear layer, D to D.
        aux_projector: the same, C to D, for the keys.
        val_projector: the same, C to D, for the values.

    Returns:
        (B, N, D), to be added to the tokens. Source: released code.
    """
    (key_norm, key_linear), (value_norm, value_linear) = aux_projector, val_projector
    normed = F.layer_norm(candidates, candidates.shape[-1:], eps=key_norm.eps)  # both norms, without their own scales
    # Scaled down first: float16 has no room for the logits before.
    queries = query_projector(tokens) * key_linear.out_features**-0.5
    queries = (queries @ key_linear.weight) * key_norm.weight
    # The norm's and the projection's biases add the same to all of a token's logits: the softmax does not see them.
    logits = (normed @ queries[..., None])[..., 0]
    weights = logits.nan_to_num().softmax(dim=-1)
    mixture = (weights[..., None, :] @ normed)[..., 0, :]
    return value_linear(mixture * value_norm.weight + value_norm.bias)


def average_patches(maps: Sequence[Tensor], corner: tuple[int, int], extent: int, size: int) -> Tensor:
    """The sub-patches of a square of the image, taken as one large patch: averages over a grid of cells.

    Args:
        maps: as in :func:`sub_patches`.
        corner: row and column of the square's first position in the first map.
        extent: positions along its edge there.
        size: cells along its edge.

    Returns:
        (B, 1, size^2, C).
    """

    def average(stage: Tensor) -> Tensor:
        scale = stage.shape[-1] / maps[0].shape[-1]
        top, left, edge = round(corner[0] * scale), round(corner[1] * scale), max(1, round(extent * scale))
        square = stage[..., top : top + edge, left : left + edge]
        return F.adaptive_avg_pool2d(square, size).flatten(2).transpose(1, 2)

    return torch.cat([average(stage) for stage in maps], dim=-1)[:, None]

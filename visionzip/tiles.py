"""Put the compressed tiles of a LLaVA-NeXT image in the order in which the language model reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def tile_order(
    dominant_indices: Tensor,
    contextual: int,
    grid: tuple[int, int],
    patches: tuple[int, int],
    *,
    cls_token: bool = True,
    keeps_cls: bool | None = None,
) -> Tensor:
    """Compute the order in which the compressed tiles of one LLaVA-NeXT image enter the language model.

    The sequence ``tokens.flatten(0, 1)[order]`` has, one after the other:

    1. all tokens of the tile that shows the whole image;
    2. the dominant patches of all other tiles in raster order of the whole image, so that a row runs across tiles;
    3. the CLS tokens of these tiles;
    4. their contextual tokens, tile by tile.

    Source: the released code, without its fixed grid of 24 x 24 patches.

    Args:
        dominant_indices: (T, K) of :class:`CompressedTokens`; tile 0 is the whole image, the others are row-major.
        contextual: M, the contextual tokens of each tile.
        grid: (columns, rows) of tiles, without the whole image: columns * rows = T - 1.
        patches: (columns, rows) of patches in a tile.
        cls_token: whether position 0 of each tile is a CLS token, so that patch 0 has position 1.
        keeps_cls: whether the first of the K is that token; None stands for the value of ``cls_token``.

    Returns:
        (T * (K + M),) int64, a permutation of the flattened tokens.

    Raises:
        ValueError: the grid does not hold T - 1 tiles.
    """
    tiles, kept = dominant_indices.shape
    grid_columns, grid_rows = grid
    if grid_columns * grid_rows != tiles - 1:
        raise ValueError(f"a grid of {grid_columns} x {grid_rows} does not hold {tiles - 1} tiles (whole image apart)")
    columns, rows = patches
    length, first_patch = kept + contextual, int(cls_token if keeps_cls is None else keeps_cls)
    device = dominant_indices.device

    tile = torch.arange(tiles - 1, device=device)[:, None]
    start = (tile + 1) * length  # where each tile begins in the flattened tokens
    patch = dominant_indices[1:, first_patch:] - int(cls_token)
    y = (tile // grid_columns) * rows + patch // columns
    x = (tile % grid_columns) * columns + patch % columns
    raster = (y * (grid_columns * columns) + x).flatten().argsort()
    patch_positions = (start + torch.arange(first_patch, kept, device=device)).flatten()[raster]

    whole_image = torch.arange(length, device=device)
    cls_positions = (start + torch.arange(first_patch, device=device)).flatten()
    contextual_positions = (start + torch.arange(kept, length, device=device)).flatten()
    return torch.cat([whole_image, patch_positions, cls_positions, contextual_positions])


def join_tiles(
    tokens: Tensor,
    dominant_indices: Tensor,
    grid: tuple[int, int],
    side: int,
    *,
    cls_token: bool = True,
    keeps_cls: bool | None = None,
) -> Tensor:
    """Join one image's compressed tiles in the order of :func:`tile_order`.

    Args:
        tokens: (T, K + M, D), the tokens of its tiles, before or after the projector.
        dominant_indices: (T, K) of :class:`CompressedTokens`, as in :func:`tile_order`.
        grid: (columns, rows) of tiles, without the whole image.
        side: patches along one edge of a tile.
        cls_token: whether position 0 of each tile is a CLS token.
        keeps_cls: whether the first of the K is that token; None stands for the value of ``cls_token``.

    Returns:
        (T * (K + M), D).

    Raises:
        ValueError: the grid does not hold T - 1 tiles.
    """
    contextual = tokens.shape[1] - dominant_indices.shape[1]
    order = tile_order(dominant_indices, contextual, grid, (side, side), cls_token=cls_token, keeps_cls=keeps_cls)
    return tokens.flatten(0, 1)[order.to(tokens.device)]

"""LLaVA-NeXT's tiles without compression: how they are laid out on the image's grid, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.mm_utils import get_anyres_image_grid_shape


class Layout(NamedTuple):
    """An image of several tiles: its (width, height) in pixels and its (columns, rows) of tiles."""

    size: tuple[int, int]
    grid: tuple[int, int]


def tile_layouts(
    counts: list[int], image_sizes: Sequence[tuple[int, int]] | None, pinpoints: Any, edge: int
) -> list[Layout | None]:
    """The layout of each image, None for one of a single tile.

    Args:
        counts: tiles of each image, the whole image included; 0 for one that is not looked at.
        image_sizes: (width, height) of each.
        pinpoints: the config's ``image_grid_pinpoints``.
        edge: edge of a tile in pixels.

    Raises:
        ValueError: a size is missing, or does not make that many tiles.
    """
    layouts: list[Layout | None] = []
    for index, count in enumerate(counts):
        if count <= 1:
            layouts.append(None)
            continue
        if image_sizes is None:
            raise ValueError(f"image {index} comes as {count} tiles: give image_sizes, the (width, height) of each")
        width, height = (int(pixels) for pixels in image_sizes[index])
        columns, rows = get_anyres_image_grid_shape((width, height), pinpoints, edge)
        if columns * rows + 1 != count:
            raise ValueError(
                f"image {index} of size {(width, height)} makes a grid of {columns} x {rows} tiles and the whole "
                f"image, {columns * rows + 1} in all, but comes as {count}: prepare it with process_images and "
                "give (width, height) of the original image"
            )
        layouts.append(Layout((width, height), (columns, rows)))
    return layouts


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cut away what padding an image to a grid has added.

    Args:
        tensor: (C, H, W) features of the padded image.
        original_size: (width, height) of the image.

    Returns:
        (C, H', W'), a view. Source: LLaVA-NeXT, with its rounding down.
    """
    width, height = original_size
    grid_height, grid_width = tensor.shape[1:]
    if width / height > grid_width / grid_height:
        border = (grid_height - int(height * (grid_width / width))) // 2
        return tensor[:, border : grid_height - border]
    border = (grid_width - int(width * (grid_height / height))) // 2
    return tensor[:, :, border : grid_width - border]


def lay_out_tiles(tokens: Tensor, layout: Layout, side: int, newline: Tensor | None) -> Tensor:
    """The whole image, then the patches of all other tiles in raster order of the image.

    Args:
        tokens: (T, side * side, D) patches of each tile; tile 0 is the whole image.
        layout: of this image.
        side: patches along one edge of a tile.
        newline: (D,) vector that ends each row, after what padding added is cut away (``spatial_unpad``), or None.

    Returns:
        (n, D).

    Raises:
        ValueError: the tiles have other tokens than their patches.
    """
    if tokens.shape[1] != side * side:
        raise ValueError(
            f"tiles are laid out as {side} x {side} patches each, but the vision tower returned {tokens.shape[1]} "
            "tokens: use mm_vision_select_feature='patch'"
        )
    columns, rows = layout.grid
    field = tokens[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns)).transpose(1, 2)
    field = field.flatten(2, 3).flatten(0, 1)  # (rows * side, columns * side, D)
    if newline is not None:
        field = unpad_image(field.permute(2, 0, 1), layout.size).permute(1, 2, 0)
        field = torch.cat([field, newline.to(field).expand(len(field), 1, -1)], dim=1)
    return torch.cat([tokens[0], field.flatten(0, 1)])

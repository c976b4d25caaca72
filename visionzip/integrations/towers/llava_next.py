"""The families LLaVA-NeXT (LLaVA-1.6) and LLaVA-NeXT-Video of transformers: tiles, and frames that are pooled.

Each tile is compressed alone. So is each frame of a video, after the model's own pooling of its patches (2 x 2 to one,
before the projector). The CLS token is not pooled. It is a dominant token as in an image, though the uncompressed model
has no CLS token in videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens, compress_images, has_cls_token, read_encoder, side_length
from visionzip.integrations.encoders import Pooling
from visionzip.integrations.huggingface import Arguments, Encoded, Modality
from visionzip.integrations.prompts.runs import Run
from visionzip.integrations.towers.base import (
    TowerFamily,
    check_layer,
    check_pixels,
    full_length,
    patch_places,
    sequence_length,
    short_counts,
)
from visionzip.integrations.towers.pooled_videos import pooled_videos, with_newlines
from visionzip.methods import EncoderRead
from visionzip.tiles import tile_order

Grid = tuple[int, int]
Layout = Tensor
"""(rows, columns) int64: for each patch of a grid of tiles its place among the grid's placeholders."""


def image_runs(base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> list[Run]:
    """Count each image's placeholders: the whole image and the unpadded grid with newlines become K + M a tile."""
    _check(base, arguments)
    sizes, tower = arguments["image_sizes"], base.vision_tower
    first, short = full_length(base, tower, arguments), short_counts(tower, config).total
    layouts = [_layout(base, size, grid) for size, grid in zip(_pairs(sizes), grids(base, sizes), strict=True)]
    return [
        Run(first + length, tile_count(grid) * short)
        for (_, length), grid in zip(layouts, grids(base, sizes), strict=True)
    ]


def encode_images(base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> Encoded:
    """Choose each image's tokens (tiles * (K + M), hidden_size) in the order of :func:`tile_order`; no newlines."""
    _check(base, arguments)
    sizes = arguments["image_sizes"]
    shapes = grids(base, sizes)
    layouts = [_layout(base, size, grid)[0] for size, grid in zip(_pairs(sizes), shapes, strict=True)]
    return encode_tiles(base, config, arguments, shapes, layouts)


def _check(base: nn.Module, arguments: Arguments) -> None:
    check_layer(base, arguments)
    check_tiles(arguments["pixel_values"], arguments.get("image_sizes"), base.vision_tower)


def encode_tiles(
    base: nn.Module,
    config: VisionZipConfig,
    arguments: Arguments,
    shapes: Sequence[Grid | None],
    layouts: Sequence[Layout | None],
) -> Encoded:
    """Choose the tokens of images, tile by tile; an image without a grid has one tile and a newline.

    Args:
        base: the model without its head.
        config: the setting, per tile.
        arguments: the call's arguments, with ``pixel_values`` (N, T, 3, h, w), where the processor has filled up images
            of fewer than T tiles; or with (tiles, 3, h, w), all tiles one after the other.
        shapes: (rows, columns) of tiles for each image; None without a grid.
        layouts: the layout of each grid; None without a grid.

    Raises:
        ValueError: an image has fewer tiles than its grid.
    """
    tower, counts = base.vision_tower, [tile_count(shape) for shape in shapes]
    compressed = compress_images(
        tower, flat_tiles(arguments["pixel_values"], counts), config, base.multi_modal_projector
    )
    features, first = base.multi_modal_projector(compressed.tokens), full_length(base, tower, arguments)
    dropped = sequence_length(tower) - first
    sizes = [None] * len(counts) if compressed.sizes is None else compressed.sizes.split(counts)
    images = Encoded([], [], None if compressed.sizes is None else [])
    for start, count, shape, layout, own in zip(_starts(counts), counts, shapes, layouts, sizes, strict=True):
        tiles = slice(start, start + count)
        chosen = CompressedTokens(*(value[tiles] for value in compressed[:4]))
        places = patch_places(chosen, dropped)
        order: Tensor | slice = slice(None)
        if shape is not None and layout is not None:
            order = _order(chosen, shape, tower, config)
            places = torch.cat([places[:1], first + _grid_places(chosen, shape, layout, tower)])
        images.tokens.append(features[tiles].flatten(0, 1)[order])
        images.places.append(places.flatten()[order])
        if images.sizes is not None and own is not None:
            images.sizes.append(own.flatten()[order])
    images = images._replace(hidden=compressed.tokens)
    if None in shapes:  # an image without a grid keeps its newline
        lone = [index for index, shape in enumerate(shapes) if shape is None]
        ended = with_newlines(images.of_runs(lone), base.image_newline, [first] * len(lone))
        for name in ("tokens", "places", "sizes"):
            for index, value in zip(lone, getattr(ended, name) or (), strict=False):
                getattr(images, name)[index] = value
    return images


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts))]


def _order(chosen: CompressedTokens, shape: Grid, tower: nn.Module, config: VisionZipConfig) -> Tensor:
    """Compute the order of an image's tokens (T * (K + M),), by :func:`visionzip.tiles.tile_order`."""
    cls = {"cls_token": has_cls_token(tower), "keeps_cls": short_counts(tower, config).cls_token}
    side = side_length(tower)
    return tile_order(chosen.dominant_indices, chosen.target_indices.shape[1], shape[::-1], (side, side), **cls)


def _grid_places(chosen: CompressedTokens, shape: Grid, layout: Layout, tower: nn.Module) -> Tensor:
    """Find the places (T - 1, K + M) of the grid's tokens among its placeholders; CLS gets its tile's corner."""
    side, columns = side_length(tower), shape[1]
    patch = (chosen.kept[1:] - int(has_cls_token(tower))).clamp(min=0)
    tile = torch.arange(len(patch), device=patch.device)[:, None]
    y, x = tile // columns * side + patch // side, tile % columns * side + patch % side
    return layout.to(patch.device)[y, x]


def tile_count(shape: Grid | None) -> int:
    """Count the tiles of an image with a grid (rows, columns), the whole image included; without a grid it is 1."""
    return 1 if shape is None else 1 + shape[0] * shape[1]


def check_tiles(pixels: Any, sizes: Any, tower: nn.Module) -> None:
    """Check the shape of the pixels, and that there is a size for each image.

    Raises:
        ValueError: the shape is wrong, or a size is missing.
    """
    check_pixels(pixels, "pixel_values", tower, "N" if isinstance(pixels, Tensor) and pixels.ndim == 4 else "N, tiles")
    if sizes is None or (pixels.ndim == 5 and len(sizes) != len(pixels)):
        given = "none" if sizes is None else len(sizes)
        raise ValueError(
            f"image_sizes must have (height, width) of each image, {given} for {len(pixels)} images: pass all that the "
            "processor returned"
        )


def grids(base: nn.Module, image_sizes: Any) -> list[Grid]:
    """Compute (rows, columns) of each image's grid of tiles, by the model's own rule."""
    edge = base.vision_tower.config.image_size
    return [get_anyres_image_grid_shape(size, base.config.image_grid_pinpoints, edge) for size in _pairs(image_sizes)]


def flat_tiles(pixel_values: Tensor, counts: list[int]) -> Tensor:
    """Collect the tiles (tiles, 3, h, w) of all images, without those that only fill up the batch.

    Raises:
        ValueError: an image has fewer tiles than its size asks for.
    """
    tiles = pixel_values.shape[1] if pixel_values.ndim == 5 else len(pixel_values)
    needed = max(counts) if pixel_values.ndim == 5 else sum(counts)
    if tiles < needed or (pixel_values.ndim == 4 and tiles != needed):
        raise ValueError(
            f"the images' sizes make {counts} tiles, but pixel_values has {tuple(pixel_values.shape)}: the processor's "
            "image_grid_pinpoints must be this model's"
        )
    if pixel_values.ndim == 4:
        return pixel_values
    return torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])


def _pairs(image_sizes: Any) -> list[tuple[int, int]]:
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes  # one transfer, not one per size
    return [(int(height), int(width)) for height, width in sizes]


def _layout(base: nn.Module, size: tuple[int, int], grid: Grid) -> tuple[Layout, int]:
    """Lay out the patches of an image's grid, and count its placeholders with the newlines."""
    return layout(unpadded(base, size, grid), grid, side_length(base.vision_tower))


def unpadded(base: nn.Module, size: tuple[int, int], grid: Grid) -> Tensor:
    """List the numbers (h, w) of a grid's patches that the model's own unpadding leaves."""
    rows, columns = (side_length(base.vision_tower) * tiles for tiles in grid)
    return unpad_image(torch.arange(rows * columns).view(1, rows, columns), size)[0]


def layout(left: Tensor, grid: Grid, side: int, shrunk: tuple[int, int] | None = None) -> tuple[Layout, int]:
    """Find the place of each patch of a grid among its placeholders, which are rows with a newline after each.

    Args:
        left: (h, w), the numbers of the patches that are no padding; a patch of padding gets the nearest one's place.
        grid: (rows, columns) of tiles.
        side: patches along one edge of a tile.
        shrunk: (rows, columns) of the placeholders, if the model interpolates the h x w patches to fewer.

    Returns:
        The places, and the number of placeholders.
    """
    rows, columns = grid[0] * side, grid[1] * side
    height, width = shrunk or tuple(left.shape)
    top, start = divmod(int(left[0, 0]), columns)
    y = (torch.arange(rows) - top).clamp(0, left.shape[0] - 1) * height // left.shape[0]
    x = (torch.arange(columns) - start).clamp(0, left.shape[1] - 1) * width // left.shape[1]
    return y[:, None] * (width + 1) + x, height * (width + 1)


def pooled_patches(base: nn.Module) -> int:
    """Count the patches of a frame after pooling."""
    return (side_length(base.vision_tower) // base.config.spatial_pool_stride) ** 2


def choose_pooled(base: nn.Module, frames: Tensor, config: VisionZipConfig) -> tuple[Tensor, CompressedTokens]:
    """Choose tokens of frames (F, 3, h, w) after pooling; scores and keys are averaged over the pooled patches."""
    tower = base.vision_tower
    read: EncoderRead = read_encoder(tower, frames, config)
    first = int(read.cls_token)

    def beside_cls(values: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([values[:, :first], pool(values[:, first:])], dim=1)

    pooled = read.replace(
        hidden_states=beside_cls(read.hidden_states, base.vision_resampler),
        scores=average(base, read.scores[..., None])[..., 0] if read.has("scores") else None,
        keys=beside_cls(read.keys, partial(average, base)) if read.has("keys") else None,
        grid=(side_length(tower) // base.config.spatial_pool_stride,) * 2,
    )
    compressed = choose_tokens(pooled, config, base.multi_modal_projector)
    return base.multi_modal_projector(compressed.tokens), compressed


def average(base: nn.Module, values: Tensor) -> Tensor:
    """Average values of patches (F, N, C) over those that the model pools to one: (F, n, C)."""
    side = side_length(base.vision_tower)
    return F.avg_pool2d(values.mT.unflatten(-1, (side, side)), base.config.spatial_pool_stride).flatten(2).mT


IMAGES = Modality("pixel_values", image_runs, encode_images)
LLAVA_NEXT = TowerFamily({"image": IMAGES}, needs=("config.image_grid_pinpoints",), tiles=True)
LLAVA_NEXT_VIDEO = TowerFamily(
    {"image": IMAGES, "video": pooled_videos(Pooling(pooled_patches, average, choose_pooled))},
    needs=("config.image_grid_pinpoints", "config.spatial_pool_stride", "vision_resampler"),
    tiles=True,
)

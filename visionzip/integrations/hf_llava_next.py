"""transformers' ``LlavaNextForConditionalGeneration`` (LLaVA-NeXT, or LLaVA-1.6): tiles, each compressed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from visionzip.config import VisionZipConfig
from visionzip.encoder import compress_images, has_cls_token, side_length
from visionzip.integrations.huggingface import (
    Family,
    Modality,
    check_layer,
    check_pixels,
    full_length,
    short_counts,
    short_length,
)
from visionzip.integrations.placeholders import Run
from visionzip.tiles import join_tiles


def image_runs(base: nn.Module, config: VisionZipConfig, arguments: Mapping[str, Any]) -> list[Run]:
    """Of each image: the whole-image tile and the unpadded grid with its newlines become K + M tokens of each tile."""
    pixels, sizes, tower = arguments["pixel_values"], arguments.get("image_sizes"), base.vision_tower
    check_tiles(pixels, sizes, tower)
    runs = []
    for size, (rows, columns) in zip(_pairs(sizes), grids(base, sizes), strict=True):
        full = full_length(base, tower, arguments) + _grid_length(base, size, rows, columns)
        runs.append(Run(full, tile_count((rows, columns)) * short_length(tower, config)))
    return runs


def image_features(
    base: nn.Module,
    config: VisionZipConfig,
    pixel_values: Tensor,
    image_sizes: Tensor,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Zipped visual tokens of images in tiles, in the place of the base model's ``get_image_features``.

    Args:
        base: the model without its head.
        config: the setting, per tile.
        pixel_values: (N, T, 3, h, w), tiles of the images that have fewer than T filled up, as the processor does; or
            (tiles, 3, h, w), all of them one after the other.
        image_sizes: (N, 2), (height, width) of the original images.
        vision_feature_layer: as in transformers; refused if it is not the model's own.
        vision_feature_select_strategy: ignored, as tiles keep their CLS token when zipped.
        **kwargs: ignored.

    Returns:
        ``pooler_output``: of each image (tiles * (K + M), hidden_size) in the order of
        :func:`visionzip.tiles.tile_order`, with no newline. ``last_hidden_state``: (tiles, K + M, D) before the
        projector.

    Raises:
        ValueError: the pixels or sizes have another shape, or another layer is asked for.
    """
    check_layer(base, vision_feature_layer)
    check_tiles(pixel_values, image_sizes, base.vision_tower)
    return tile_features(base, config, pixel_values, grids(base, image_sizes))


def tile_features(
    base: nn.Module, config: VisionZipConfig, pixel_values: Tensor, shapes: Sequence[tuple[int, int] | None]
) -> BaseModelOutputWithPooling:
    """Zipped visual tokens of images, each by its grid (rows, columns); one without has one tile, and a newline.

    Args:
        base: the model without its head.
        config: the setting, per tile.
        pixel_values: as in :func:`image_features`.
        shapes: of each image.

    Returns:
        What :func:`image_features` returns; of an image without a grid (K + M + 1, hidden_size).

    Raises:
        ValueError: an image comes as fewer tiles than its grid has.
    """
    tower, counts = base.vision_tower, [tile_count(shape) for shape in shapes]
    compressed = compress_images(tower, flat_tiles(pixel_values, counts), config, base.multi_modal_projector)
    features = base.multi_modal_projector(compressed.tokens)
    cls = {"cls_token": has_cls_token(tower), "keeps_cls": short_counts(tower, config).cls_token}
    kept = compressed.dominant_indices.split(counts)
    images = []
    for tokens, indices, shape in zip(features.split(counts), kept, shapes, strict=True):
        if shape is None:
            images.append(torch.cat([tokens[0], base.image_newline[None].to(tokens)]))
        else:
            images.append(join_tiles(tokens, indices, shape[::-1], side_length(tower), **cls))
    return BaseModelOutputWithPooling(last_hidden_state=compressed.tokens, pooler_output=images)


def tile_count(shape: tuple[int, int] | None) -> int:
    """Tiles of an image with a grid (rows, columns), the whole image included; 1 without."""
    return 1 if shape is None else 1 + shape[0] * shape[1]


def check_tiles(pixels: Any, sizes: Any, tower: nn.Module) -> None:
    """Check the pixels' shape, and that there is a size for each image.

    Raises:
        ValueError: that is not so.
    """
    check_pixels(pixels, "pixel_values", tower, "N" if isinstance(pixels, Tensor) and pixels.ndim == 4 else "N, tiles")
    if sizes is None or (pixels.ndim == 5 and len(sizes) != len(pixels)):
        given = "none" if sizes is None else len(sizes)
        raise ValueError(
            f"image_sizes must have (height, width) of each image, {given} for {len(pixels)} images: pass all that the "
            "processor returned"
        )


def grids(base: nn.Module, image_sizes: Any) -> list[tuple[int, int]]:
    """(rows, columns) of each image's grid of tiles, by the model's own rule."""
    edge = base.vision_tower.config.image_size
    return [get_anyres_image_grid_shape(size, base.config.image_grid_pinpoints, edge) for size in _pairs(image_sizes)]


def flat_tiles(pixel_values: Tensor, counts: list[int]) -> Tensor:
    """The tiles (tiles, 3, h, w) of all images, without those that only fill the batch up.

    Raises:
        ValueError: an image comes as fewer tiles than its size makes.
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


def _grid_length(base: nn.Module, size: tuple[int, int], rows: int, columns: int) -> int:
    """Patches of the grid that are left after unpadding, and a newline for each of their rows."""
    side = side_length(base.vision_tower)
    height, width = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), size).shape[1:]
    return height * (width + 1)


FAMILY = Family(
    {"image": Modality("pixel_values", image_runs, image_features)},
    needs=("config.image_grid_pinpoints",),
    tiles=True,
)

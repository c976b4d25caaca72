"""transformers' LLaVA-OneVision: SigLIP, which has no CLS token, images in tiles, and videos whose frames it pools.

An image alone in its prompt comes in tiles, read in the order of LLaVA-NeXT; one of several has a single tile and keeps
its trailing newline. The model shrinks the patches of more than nine tiles to nine tiles' worth (``anyres_max_9``);
zipped tiles are not interpolated, as chosen tokens are no grid: each of them has its K + M, however many they are.

Every frame of a video is compressed alone, after the model's own pooling (27 x 27 to 14 x 14, behind the projector),
and the newline at the video's end stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens, has_cls_token, read_encoder, side_length
from visionzip.integrations.hf_llava_next import check_tiles, grids, tile_count, tile_features
from visionzip.integrations.huggingface import (
    Family,
    Modality,
    check_layer,
    check_pixels,
    full_length,
    short_length,
)
from visionzip.integrations.placeholders import Run
from visionzip.methods import token_counts


def image_runs(base: nn.Module, config: VisionZipConfig, arguments: Mapping[str, Any]) -> list[Run]:
    """Of each image: K + M tokens of each tile, or of its one tile and a newline."""
    sizes, tower = arguments.get("image_sizes"), base.vision_tower
    check_tiles(arguments["pixel_values"], sizes, tower)
    runs, patches = [], full_length(base, tower, arguments)
    for size, grid in zip(sizes, _grids(base, sizes, arguments.get("batch_num_images")), strict=True):
        # The model's own rule for cutting away padding and shrinking, on tensors without content.
        packed, _ = base.pack_image_features(
            [torch.empty(tile_count(grid), patches, 1, device="meta")],
            [[int(pixels) for pixels in size]],
            image_newline=torch.empty(1, device="meta"),
            vision_aspect_ratio=arguments.get("vision_aspect_ratio") or base.config.vision_aspect_ratio,
        )
        runs.append(Run(len(packed[0]), tile_count(grid) * short_length(tower, config) + (grid is None)))
    return runs


def image_features(
    base: nn.Module,
    config: VisionZipConfig,
    pixel_values: Tensor,
    image_sizes: Tensor,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    vision_aspect_ratio: str | None = None,
    batch_num_images: Tensor | None = None,
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
        vision_feature_select_strategy: ignored, as a CLS token is kept if there is one.
        vision_aspect_ratio: ignored, as nothing is interpolated.
        batch_num_images: images of each prompt; those of a prompt with several have one tile. All alone if None.
        **kwargs: ignored.

    Returns:
        ``pooler_output``: of each image (tiles * (K + M), hidden_size) in the order of
        :func:`visionzip.tiles.tile_order`, or (K + M + 1, hidden_size) with one tile. ``last_hidden_state``:
        (tiles, K + M, D) before the projector.

    Raises:
        ValueError: the pixels, sizes or numbers do not fit together, or another layer is asked for.
    """
    check_layer(base, vision_feature_layer)
    check_tiles(pixel_values, image_sizes, base.vision_tower)
    return tile_features(base, config, pixel_values, _grids(base, image_sizes, batch_num_images))


def video_runs(base: nn.Module, config: VisionZipConfig, arguments: Mapping[str, Any]) -> list[Run]:
    """One run for each video (N, frames, 3, h, w): the pooled patches of its frames, and a newline."""
    pixels, tower = arguments["pixel_values_videos"], base.vision_tower
    check_pixels(pixels, "pixel_values_videos", tower, "N, frames")
    frames, full = pixels.shape[1], pooled_patches(base)
    return [Run(frames * full + 1, frames * token_counts(config, full, has_cls_token(tower)).total + 1)] * len(pixels)


def pooled_patches(base: nn.Module) -> int:
    """Patches of a frame after pooling: 14 x 14 of 27 x 27."""
    return math.ceil(side_length(base.vision_tower) / 2) ** 2


def video_features(
    base: nn.Module,
    config: VisionZipConfig,
    pixel_values_videos: Tensor,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Zipped visual tokens of videos, in the place of the base model's ``get_video_features``.

    The projected patches, their scores and their keys are pooled alike, so that what is kept is what the model alone
    would have seen, and what is merged are such tokens.

    Args:
        base: the model without its head.
        config: the setting, per frame.
        pixel_values_videos: (N, frames, 3, h, w).
        vision_feature_layer: as in transformers; refused if it is not the model's own.
        vision_feature_select_strategy: ignored, as a CLS token is kept if there is one (it is not pooled).
        **kwargs: ignored.

    Returns:
        ``pooler_output``: (N, frames * (K + M) + 1, hidden_size).

    Raises:
        ValueError: the pixels have another shape, or another layer is asked for.
    """
    check_layer(base, vision_feature_layer)
    tower = base.vision_tower
    check_pixels(pixel_values_videos, "pixel_values_videos", tower, "N, frames")
    read = read_encoder(tower, pixel_values_videos.flatten(0, 1), config)

    def pool(tokens: Tensor) -> Tensor:
        first = int(read.cls_token)
        return torch.cat([tokens[:, :first], base.apply_pooling(tokens[:, first:])], dim=1)

    pooled = replace(
        read,
        hidden_states=pool(base.multi_modal_projector(read.hidden_states)),
        scores=None if read.scores is None else base.apply_pooling(read.scores[..., None])[..., 0],
        keys=None if read.keys is None else pool(read.keys),
        grid=(math.isqrt(pooled_patches(base)),) * 2,
    )
    tokens = choose_tokens(replace(pooled, projected=pooled.patches), config).tokens
    videos = tokens.unflatten(0, pixel_values_videos.shape[:2]).flatten(1, 2)
    newline = base.image_newline.expand(len(videos), 1, -1).to(videos)
    return BaseModelOutputWithPooling(pooler_output=torch.cat([videos, newline], dim=1))


def _grids(base: nn.Module, image_sizes: Any, batch_num_images: Any) -> list[tuple[int, int] | None]:
    """(rows, columns) of each image's tiles; None for an image that shares its prompt with others.

    Raises:
        ValueError: the numbers do not add up to the images.
    """
    alone = [True] * len(image_sizes)
    if batch_num_images is not None:
        numbers = [int(number) for number in batch_num_images]
        alone = [number == 1 for number in numbers for _ in range(number)]
        if len(alone) != len(image_sizes):
            raise ValueError(
                f"batch_num_images={numbers} are {len(alone)} images, but image_sizes has {len(image_sizes)}: pass all "
                "that the processor returned"
            )
    return [grid if own else None for grid, own in zip(grids(base, image_sizes), alone, strict=True)]


FAMILY = Family(
    {
        "image": Modality("pixel_values", image_runs, image_features),
        "video": Modality("pixel_values_videos", video_runs, video_features, pooled_patches=pooled_patches),
    },
    needs=(
        "config.image_grid_pinpoints",
        "config.vision_aspect_ratio",
        "image_newline",
        "pack_image_features",
        "apply_pooling",
    ),
    tiles=True,
)

"""transformers' LLaVA-NeXT-Video: images in tiles as LLaVA-NeXT has them, and videos whose frames the model pools.

Every frame is compressed alone, after the model's own pooling of its patches (2 x 2 to one, before the projector). CLS
is not pooled; it is a dominant token, as in an image, though the model alone has none for videos.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens, has_cls_token, read_encoder, side_length
from visionzip.integrations.hf_llava_next import image_features, image_runs
from visionzip.integrations.huggingface import Family, Modality, check_layer, check_pixels
from visionzip.integrations.placeholders import Run
from visionzip.methods import token_counts


def video_runs(base: nn.Module, config: VisionZipConfig, arguments: Mapping[str, Any]) -> list[Run]:
    """One run for each video (N, frames, 3, h, w): the pooled patches of its frames."""
    pixels, tower = arguments["pixel_values_videos"], base.vision_tower
    check_pixels(pixels, "pixel_values_videos", tower, "N, frames")
    frames, full = pixels.shape[1], pooled_patches(base)
    return [Run(frames * full, frames * token_counts(config, full, has_cls_token(tower)).total)] * len(pixels)


def pooled_patches(base: nn.Module) -> int:
    """Patches of a frame after pooling."""
    return (side_length(base.vision_tower) // base.config.spatial_pool_stride) ** 2


def video_features(
    base: nn.Module,
    config: VisionZipConfig,
    pixel_values_videos: Tensor,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Zipped visual tokens of videos, in the place of the base model's ``get_video_features``.

    Scores and keys of the patches that are pooled to one are averaged, whichever way the model pools the patches.

    Args:
        base: the model without its head.
        config: the setting, per frame.
        pixel_values_videos: (N, frames, 3, h, w).
        vision_feature_layer: as in transformers; refused if it is not the model's own.
        vision_feature_select_strategy: ignored, as frames keep their CLS token when zipped.
        **kwargs: ignored.

    Returns:
        ``pooler_output``: (N, frames * (K + M), hidden_size).

    Raises:
        ValueError: the pixels have another shape, or another layer is asked for.
    """
    check_layer(base, vision_feature_layer)
    tower = base.vision_tower
    check_pixels(pixel_values_videos, "pixel_values_videos", tower, "N, frames")
    read = read_encoder(tower, pixel_values_videos.flatten(0, 1), config)
    first = int(read.cls_token)

    def average(values: Tensor) -> Tensor:
        field = values.mT.unflatten(-1, (side_length(tower), side_length(tower)))
        return F.avg_pool2d(field, base.config.spatial_pool_stride).flatten(2).mT

    def beside_cls(values: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([values[:, :first], pool(values[:, first:])], dim=1)

    pooled = replace(
        read,
        hidden_states=beside_cls(read.hidden_states, base.vision_resampler),
        scores=None if read.scores is None else average(read.scores[..., None])[..., 0],
        keys=None if read.keys is None else beside_cls(read.keys, average),
        grid=(side_length(tower) // base.config.spatial_pool_stride,) * 2,
    )
    tokens = choose_tokens(pooled, config, base.multi_modal_projector).tokens
    features = base.multi_modal_projector(tokens).unflatten(0, pixel_values_videos.shape[:2])
    return BaseModelOutputWithPooling(pooler_output=features.flatten(1, 2))


FAMILY = Family(
    {
        "image": Modality("pixel_values", image_runs, image_features),
        "video": Modality("pixel_values_videos", video_runs, video_features, pooled_patches=pooled_patches),
    },
    needs=("config.image_grid_pinpoints", "config.spatial_pool_stride", "vision_resampler"),
    tiles=True,
)

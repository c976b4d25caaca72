"""transformers' VideoLlava: two CLIP encoders, one for images and one for videos, whose frames are read one by one.

Every image and every frame is compressed alone. The paper's 136 tokens of a video (its Table 3) are 17 of each of 8
frames; how many of them are dominant it does not say: 15 + 2 here; by the ratio of its settings for images it would be
14 + 3. The original model attends over time in its video encoder, for which this class has no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import VisionZipConfig
from visionzip.encoder import compress_images
from visionzip.integrations.huggingface import (
    Family,
    Modality,
    check_layer,
    check_pixels,
    full_length,
    sequence_length,
    short_length,
)
from visionzip.integrations.placeholders import Run


def image_runs(base: nn.Module, config: VisionZipConfig, arguments: Mapping[str, Any]) -> list[Run]:
    """One run for each image (N, 3, h, w): by default the patches, without CLS."""
    pixels, tower = arguments["pixel_values"], base.image_tower
    check_pixels(pixels, "pixel_values", tower, "N")
    return [Run(full_length(base, tower, arguments), short_length(tower, config))] * len(pixels)


def video_runs(base: nn.Module, config: VisionZipConfig, arguments: Mapping[str, Any]) -> list[Run]:
    """One run for each video (N, frames, 3, h, w): all tokens of its frames, CLS too."""
    pixels, tower = arguments["pixel_values_videos"], base.video_tower
    check_pixels(pixels, "pixel_values_videos", tower, "N, frames")
    frames = pixels.shape[1]
    return [Run(frames * sequence_length(tower), frames * short_length(tower, config))] * len(pixels)


def image_features(
    base: nn.Module,
    config: VisionZipConfig,
    pixel_values: Tensor | None = None,
    pixel_values_images: Tensor | None = None,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Zipped visual tokens of images, in the place of the base model's ``get_image_features``.

    Args:
        base: the model without its head.
        config: the setting.
        pixel_values: (N, 3, h, w).
        pixel_values_images: the same, by the name that the image processor still gives it.
        vision_feature_layer: as in transformers; refused if it is not the model's own.
        vision_feature_select_strategy: ignored, as images keep their CLS token when zipped.
        **kwargs: ignored.

    Returns:
        ``pooler_output``: (N, K + M, hidden_size). ``last_hidden_state``: before the projector.

    Raises:
        ValueError: the pixels have another shape, or another layer is asked for.
    """
    check_layer(base, vision_feature_layer)
    pixels = pixel_values_images if pixel_values is None else pixel_values
    check_pixels(pixels, "pixel_values", base.image_tower, "N")
    tokens = compress_images(base.image_tower, pixels, config, base.multi_modal_projector).tokens
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=base.multi_modal_projector(tokens))


def video_features(
    base: nn.Module,
    config: VisionZipConfig,
    pixel_values_videos: Tensor,
    vision_feature_layer: int | list[int] | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Zipped visual tokens of videos, in the place of the base model's ``get_video_features``.

    Args:
        base: the model without its head.
        config: the setting, per frame.
        pixel_values_videos: (N, frames, 3, h, w).
        vision_feature_layer: as in transformers; refused if it is not the model's own.
        **kwargs: ignored.

    Returns:
        ``pooler_output``: (N * frames, K + M, hidden_size). ``last_hidden_state``: before the projector.

    Raises:
        ValueError: the pixels have another shape, or another layer is asked for.
    """
    check_layer(base, vision_feature_layer)
    check_pixels(pixel_values_videos, "pixel_values_videos", base.video_tower, "N, frames")
    frames = pixel_values_videos.flatten(0, 1)
    tokens = compress_images(base.video_tower, frames, config, base.multi_modal_projector).tokens
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=base.multi_modal_projector(tokens))


FAMILY = Family(
    {
        "image": Modality("pixel_values", image_runs, image_features, former_pixels="pixel_values_images"),
        "video": Modality("pixel_values_videos", video_runs, video_features),
    },
    towers=("image_tower", "video_tower"),
    default=VisionZipConfig(15, 2),
)

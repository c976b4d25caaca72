"""transformers' ``LlavaForConditionalGeneration`` (LLaVA-1.5 and what is built like it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import VisionZipConfig
from visionzip.encoder import compress_images
from visionzip.integrations.huggingface import Family, Modality, check_layer, check_pixels, full_length, short_length
from visionzip.integrations.placeholders import Run


def image_runs(base: nn.Module, config: VisionZipConfig, arguments: Mapping[str, Any]) -> list[Run]:
    """576 placeholders become 64, of each image."""
    pixels, tower = arguments["pixel_values"], base.vision_tower
    check_pixels(pixels, "pixel_values", tower, "N")
    return [Run(full_length(base, tower, arguments), short_length(tower, config))] * len(pixels)


def image_features(
    base: nn.Module,
    config: VisionZipConfig,
    pixel_values: Tensor,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Zipped visual tokens of images (N, 3, h, w), in the place of the base model's ``get_image_features``.

    Returns:
        ``pooler_output``: N times (K + M, hidden_size). ``last_hidden_state``: before the projector.

    Raises:
        ValueError: the pixels have another shape, or another layer is asked for.
    """
    check_layer(base, vision_feature_layer)
    check_pixels(pixel_values, "pixel_values", base.vision_tower, "N")
    tokens = compress_images(base.vision_tower, pixel_values, config, base.multi_modal_projector).tokens
    features = base.multi_modal_projector(tokens)
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=list(features))


FAMILY = Family({"image": Modality("pixel_values", image_runs, image_features)})

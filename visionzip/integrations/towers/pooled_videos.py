"""Videos of LLaVA families whose frames the model pools before tokens are chosen, and newlines after runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.config import VisionZipConfig
from visionzip.encoder import has_cls_token
from visionzip.integrations.encoders import Pooling
from visionzip.integrations.huggingface import Arguments, Encoded, Modality
from visionzip.integrations.prompts.runs import Run
from visionzip.integrations.towers.base import check_layer, check_pixels, joined
from visionzip.methods import token_counts


def pooled_videos(pooling: Pooling, newline: bool = False) -> Modality:
    """Define videos whose frames the model pools before tokens are chosen.

    Args:
        pooling: how it does.
        newline: whether the base model's ``image_newline`` ends a video.
    """
    shape: dict[str, Any] = {"pooling": pooling, "newline": newline}
    runs, encode = partial(_pooled_runs, **shape), partial(_pooled_encode, **shape)
    return Modality("pixel_values_videos", runs, encode, stacked=True, pooling=pooling)


def _pooled_runs(
    base: nn.Module,
    config: VisionZipConfig,
    arguments: Arguments,
    pooling: Pooling,
    newline: bool,
) -> list[Run]:
    pixels, tower = arguments["pixel_values_videos"], base.vision_tower
    check_layer(base, arguments)
    check_pixels(pixels, "pixel_values_videos", tower, "N, frames")
    frames, full = pixels.shape[1], pooling.patches(base)
    short = token_counts(config, full, has_cls_token(tower)).total
    return [Run(frames * full + newline, frames * short + newline)] * len(pixels)


def _pooled_encode(
    base: nn.Module, config: VisionZipConfig, arguments: Arguments, pooling: Pooling, newline: bool
) -> Encoded:
    runs = _pooled_runs(base, config, arguments, pooling, newline)
    pixels, tower = arguments["pixel_values_videos"], base.vision_tower
    tokens, compressed = pooling.choose(base, pixels.flatten(0, 1), config)
    encoded = joined(tokens, compressed, pixels.shape[1], pooling.patches(base), int(has_cls_token(tower)))
    if not newline:
        return encoded
    return with_newlines(encoded, base.image_newline, [run.full - 1 for run in runs])


def with_newlines(encoded: Encoded, newline: Tensor, places: list[int]) -> Encoded:
    """Append a newline to each run, with its place among the run's placeholders."""

    def end(values: list[Tensor], last: list[int]) -> list[Tensor]:
        return [torch.cat([value, value.new_tensor([own])]) for value, own in zip(values, last, strict=True)]

    return encoded._replace(
        tokens=[torch.cat([own, newline[None].to(own)]) for own in encoded.tokens],
        places=end(encoded.places, places),
        sizes=encoded.sizes and end(encoded.sizes, [1] * len(places)),
    )

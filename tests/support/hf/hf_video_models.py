"""Tiny random models of transformers' video families, with their stock processors, for the tests.

The processors are transformers' own, counting rules included. Only what decodes and resizes videos is a stand-in, as
transformers' video processors need torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
from hf_models import IMAGE, PAD, VIDEO, text_config, tokenizer, vision_config
from torch import Tensor
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    Qwen2Config,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)
from transformers.video_utils import make_batched_videos

FAMILIES = {
    "onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
    "next_video": (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
    "video_llava": (VideoLlavaConfig, VideoLlavaForConditionalGeneration),
}


def build(family: str, *, edge: int = 56, siglip: bool | None = None, **config: Any) -> Any:
    """A random model of a family, in float32, ready for inference; the same arguments give the same weights.

    Args:
        family: a key of ``FAMILIES``.
        edge: of an image, tile or frame, in pixels; a patch is 14 x 14.
        siglip: an encoder without CLS token; OneVision's only, if not given.
        **config: fields of the model's config.
    """
    config_class, model_class = FAMILIES[family]
    text: Any = text_config()
    if family == "onevision":
        text = Qwen2Config.from_dict(text.to_dict() | {"model_type": "qwen2"})
    if family != "video_llava":
        config.setdefault("image_grid_pinpoints", pinpoints(edge))
    vision = vision_config(family == "onevision" if siglip is None else siglip, image_size=edge)
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO, "pad_token_id": PAD}
    return hf_models.build(model_class, config_class(vision_config=vision, text_config=text, **tokens, **config))


def pinpoints(edge: int) -> list[list[int]]:
    """(height, width) of the grids of at most 2 x 2 tiles, and 1 x 3."""
    return [[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge], [edge, 3 * edge]]


class Frames:
    """In the place of a video processor: a video is an array (F, H, W, 3), each frame is prepared as an image."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, edge: int) -> None:
        self.prepare = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})

    def __call__(self, videos: Any, **_: Any) -> BatchFeature:
        frames = [np.stack(self.prepare(list(video))["pixel_values"]) for video in make_batched_videos(videos)]
        return BatchFeature({"pixel_values_videos": frames}, tensor_type="pt")


def processor_for(family: str, *, edge: int = 56, padding_side: str = "left", **settings: Any) -> Any:
    """transformers' own processor of a family; ``settings`` replace its arguments."""
    size, crop = {"shortest_edge": edge}, {"height": edge, "width": edge}
    base, image_processor, counting = {
        "onevision": (
            LlavaOnevisionProcessor,
            LlavaOnevisionImageProcessorPil(size=crop, image_grid_pinpoints=pinpoints(edge)),
            {"num_image_tokens": (edge // 14) ** 2, "vision_feature_select_strategy": "full"},
        ),
        "next_video": (
            LlavaNextVideoProcessor,
            LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=pinpoints(edge)),
            {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        ),
        "video_llava": (VideoLlavaProcessor, VideoLlavaImageProcessor(size=size, crop_size=crop), {"patch_size": 14}),
    }[family]

    class Processor(base):  # the check of the parts' classes would import torchvision
        def check_argument_for_proper_class(self, *_: Any) -> None: ...

    parts = {"image_processor": image_processor, "video_processor": Frames(edge), "tokenizer": tokenizer(padding_side)}
    return Processor(**parts, **{**counting, **settings})


def save(family: str, folder: Path) -> Path:
    """Write a tiny checkpoint of a family, as transformers saves it."""
    stock = processor_for(family)
    for part in (build(family), stock.tokenizer, stock.image_processor):
        part.save_pretrained(folder)
    return folder


def video(seed: int, frames: int = 3) -> np.ndarray:
    """A video of noise (F, 60, 90, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (frames, 60, 90, 3), dtype=np.uint8)


# A model and its processor of each of transformers' LLaVA families, those without videos too.
STOCK: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    **hf_models.FAMILIES,
    **{name: (lambda name=name: build(name), lambda name=name: processor_for(name)) for name in FAMILIES},
}


def one_image_for(family: str) -> tuple[Any, Any, Any, Tensor]:
    """A model of ``STOCK``, its processor, what that makes of a prompt with one image, and the image's tiles.

    The tiles are (T, 3, h, w).
    """
    model, processor = (make() for make in STOCK[family])
    inputs = processor(images=[hf_models.IMAGES[0]], text=["what is <image> here"], return_tensors="pt")
    return model, processor, inputs, inputs.get("pixel_values", inputs.get("pixel_values_images")).flatten(0, -4)

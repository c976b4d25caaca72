"""Models of named shapes with random weights, made on the device that they run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PretrainedConfig,
)
from transformers import LlavaConfig as TransformersLlavaConfig

from llava.model import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    VideoLlavaLlamaConfig,
    VideoLlavaLlamaForCausalLM,
)
from llava.model.stock.transformers_llava import TransformersLlava

VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# A tower as small beside its language model as ViT-L is beside the 7B (5 % of the prefill's operations), with as many
# tokens as ViT-L.
VIT_MINI = {**VIT_L_14_336, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10}
VIT_MINI["num_attention_heads"] = 4
VIT_SMALL = {**VIT_L_14_336, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 5}
VIT_SMALL["num_attention_heads"] = 2
VIT_TINY = {**VIT_MINI, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "image_size": 112}
VIT_L_14_224 = {**VIT_L_14_336, "image_size": 224}  # LanguageBind's
VIT_VIDEO_MINI = {**VIT_L_14_224, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
VIT_VIDEO_MINI["num_attention_heads"] = 2
TOWERS = {"vit-l-14-336": VIT_L_14_336, "tiny": VIT_TINY}  # of the LLaVAs; to try the command itself


@dataclass(frozen=True)
class Shape:
    """A LLaVA model without its weights.

    Attributes:
        width, layers, heads, intermediate, vocabulary: of the Llama.
        vision: the CLIP tower's config.
        tiles: 1, or 5 for LLaVA-NeXT, whose images of twice the tower's edge make a grid of 2 x 2 and the whole image.
        frames: of Video-LLaVA, whose video tower has the images' shape: frames that attend to each other; else None.
    """

    width: int
    layers: int
    heads: int
    intermediate: int
    vision: dict[str, Any]
    tiles: int
    vocabulary: int = 32000
    frames: int | None = None

    @property
    def visual_tokens(self) -> int:
        """Patches of an image's tiles; no newlines, as the paper counts (2880)."""
        return self.tiles * (self.vision["image_size"] // self.vision["patch_size"]) ** 2


_7B = {"width": 4096, "layers": 32, "heads": 32, "intermediate": 11008, "vision": VIT_L_14_336}
_13B = {"width": 5120, "layers": 40, "heads": 40, "intermediate": 13824, "vision": VIT_L_14_336}
SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape(**_7B, tiles=1),
    "llava-1.5-13b": Shape(**_13B, tiles=1),
    "llava-next-7b": Shape(**_7B, tiles=5),
    "llava-next-13b": Shape(**_13B, tiles=5),
    "llava-next-mini": Shape(1024, 8, 8, 2752, VIT_MINI, tiles=5),  # for CPU: 2880 visual tokens, 8 layers
    "llava-1.5-mini": Shape(1024, 8, 8, 2752, VIT_MINI, tiles=1),
    "llava-next-tiny": Shape(64, 4, 4, 172, VIT_TINY, tiles=5, vocabulary=512),  # to try the command itself
    # For training on a CPU: 576 visual tokens, and a tower as much smaller than the language model as the 7B's.
    "llava-1.5-small": Shape(384, 6, 6, 1024, VIT_SMALL, tiles=1, vocabulary=2000),
    "llava-1.5-tiny": Shape(64, 4, 4, 172, VIT_TINY, tiles=1, vocabulary=512),
    "video-llava-7b": Shape(**_7B | {"vision": VIT_L_14_224}, tiles=1, frames=8),
    "video-llava-mini": Shape(512, 6, 8, 1376, VIT_VIDEO_MINI, tiles=1, frames=8),  # for CPU: 2056 tokens of 8 frames
    "video-llava-tiny": Shape(64, 4, 4, 172, VIT_TINY, tiles=1, vocabulary=512, frames=8),
}


def build_model(name: str, device: str, dtype: torch.dtype, transformers: bool = False) -> Any:
    """A LLaVA of random weights, drawn on the device: no copy of it is ever made elsewhere.

    Args:
        name: key of :data:`SHAPES`.
        device: where it is to be.
        dtype: of all its weights.
        transformers: of transformers' own class.

    Raises:
        ValueError: the shape is unknown, or of videos with ``transformers``.
    """
    if name not in SHAPES:
        raise ValueError(f"--shape {name} is unknown: use one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if transformers and shape.frames is not None:
        raise ValueError(
            f"--shape {name} --transformers: only images have shapes of transformers' classes; leave one out"
        )
    model = random_model(*(_transformers_config if transformers else _config)(shape), device, dtype)
    if transformers:
        return TransformersLlava(model).requires_grad_(False).eval()
    for tower in model.towers().values():
        tower.is_loaded = True
    return model


def random_model(model_class: type, config: PretrainedConfig, device: str, dtype: torch.dtype) -> Any:
    """A model of random weights, drawn on the device, with sdpa attention; for inference.

    Args:
        model_class: of transformers' kind.
        config: for it.
        device: where it is to be.
        dtype: of all its weights.
    """
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Under a device context modules are made there and initialise themselves there, buffers (rotary frequencies,
        # position ids) included; on the meta device those would stay empty.
        with torch.device(device), torch.random.fork_rng(devices=_cuda_devices(device)):
            torch.manual_seed(0)
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def _language_model(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _config(shape: Shape) -> tuple[type, PretrainedConfig]:
    edge = shape.vision["image_size"]
    config_class, model_class = LlavaConfig, LlavaLlamaForCausalLM
    encoder = CLIPVisionConfig(**shape.vision).to_dict()
    towers = {"mm_vision_tower": "random", "mm_vision_config": encoder}
    if shape.frames is not None:
        config_class, model_class = VideoLlavaLlamaConfig, VideoLlavaLlamaForCausalLM
        towers = {"mm_image_tower": "random", "mm_image_config": encoder, "mm_video_tower": "random"}
        towers["mm_video_config"] = {**encoder, "add_time_attn": True, "num_frames": shape.frames}
    config = config_class(
        **_language_model(shape),
        **towers,
        mm_hidden_size=shape.vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_patch_merge_type="flat" if shape.tiles == 1 else "spatial",
        image_aspect_ratio="pad" if shape.tiles == 1 else "anyres",
        image_grid_pinpoints=[[2 * edge, 2 * edge]],
    )
    return model_class, config


def _transformers_config(shape: Shape) -> tuple[type, PretrainedConfig]:
    own = {**_language_model(shape), "vocab_size": shape.vocabulary + 64}  # as llava-hf's, for <image> and padding
    parts = {"text_config": LlamaConfig(**own), "vision_config": CLIPVisionConfig(**shape.vision)}
    parts["image_token_index"] = shape.vocabulary
    if shape.tiles == 1:
        return LlavaForConditionalGeneration, TransformersLlavaConfig(**parts)
    edge = shape.vision["image_size"]
    return LlavaNextForConditionalGeneration, LlavaNextConfig(**parts, image_grid_pinpoints=[[2 * edge, 2 * edge]])


def _cuda_devices(device: str) -> list[int]:
    place = torch.device(device)
    return [place.index or 0] if place.type == "cuda" else []

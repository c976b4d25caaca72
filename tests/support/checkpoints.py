"""Small checkpoints in exactly the original layout, for the tests: a folder as ``liuhaotian/llava-v1.5-7b`` has it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.model import (
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaQwenForCausalLM,
    VideoLlavaLlamaForCausalLM,
)
from llava.model.multimodal_encoder.languagebind import LanguageBindVideoConfig, LanguageBindVideoModel

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "models" / "toy_tokenizer.model"
TOWER_PREFIX = "model.vision_tower.vision_tower."

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
VIDEO = {"add_time_attn": True, "num_frames": 8, "lora_r": 0, "force_patch_dropout": 0.0}  # LanguageBind's
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
LANGUAGE_MODEL = {
    "vocab_size": 480,  # of the toy tokenizer
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
}
NEXT = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
MODELS = {
    "llava_llama": LlavaLlamaForCausalLM,
    "llava_mistral": LlavaMistralForCausalLM,
    "llava_qwen": LlavaQwenForCausalLM,
}


def write_tower(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """An encoder as on the hub: config, processor, and weights under ``vision_model.``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    edge = config["image_size"]
    processor = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    if config["model_type"].startswith("clip"):
        processor |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": edge},
            "crop_size": {"height": edge, "width": edge},
            "do_center_crop": True,
            "resample": 3,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
    else:
        processor |= {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": edge, "width": edge},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, tokenizer: Path = TOKENIZER, legacy: bool = False) -> None:
    """A Llama tokenizer as LLaVA's checkpoints have it: SentencePiece model and settings."""
    shutil.copy(tokenizer, folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_bos_token": True,
        "add_eos_token": False,
        "padding_side": "right",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_checkpoint(
    folder: Path,
    *,
    model_type: str = "llava_llama",
    vision: dict[str, Any] = CLIP,
    tower_inside: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """A random checkpoint and its vision tower (in ``folder-tower``); returns ``folder``.

    Args:
        tower_inside: the checkpoint has the tower's weights too, as fine-tuned ones do.
        **overrides: fields of the config.
    """
    torch.manual_seed(seed)
    tower = folder.with_name(folder.name + "-tower")
    config_class, encoder_class = {
        "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
        "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    }[vision["model_type"]]
    encoder = encoder_class(config_class(**vision))
    scale_up(encoder)
    write_tower(tower, vision, {f"vision_model.{key}": value for key, value in encoder.state_dict().items()})

    model_class = MODELS[model_type]
    values = {**LANGUAGE_MODEL, **overrides, "mm_vision_tower": str(tower)}
    model = model_class(model_class.config_class(**values))
    scale_up(model)
    model.get_vision_tower().load_model()
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    if values.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    if not tower_inside:
        weights = {key: value for key, value in weights.items() if not key.startswith(TOWER_PREFIX)}
    folder.mkdir(parents=True, exist_ok=True)
    config = {**values, "model_type": model_type, "architectures": [model_class.__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_video_checkpoint(
    folder: Path,
    *,
    vision: dict[str, Any] = CLIP,
    frames: int = 8,
    towers_inside: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """A random Video-LLaVA as ``LanguageBind/Video-LLaVA-7B``, its towers in ``folder-image`` and ``folder-video``.

    Args:
        frames: that attend to each other.
        towers_inside: the checkpoint has the towers' weights too, as the released one does.
        **overrides: fields of the config.
    """
    vision = {**vision, "hidden_act": "gelu"}  # LanguageBind's, not CLIP's
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    encoders = {
        "image": CLIPVisionModel(CLIPVisionConfig(**vision)),
        "video": LanguageBindVideoModel(LanguageBindVideoConfig(**vision | VIDEO | {"num_frames": frames})),
    }
    values = {**LANGUAGE_MODEL, **overrides}
    for kind, encoder in encoders.items():
        scale_up(encoder)
        tower = folder.with_name(f"{folder.name}-{kind}")
        tower.mkdir(exist_ok=True)
        more = VIDEO | {"num_frames": frames} if kind == "video" else {"add_time_attn": False, "num_frames": 1}
        config = {"model_type": f"LanguageBind{kind.title()}", "projection_dim": 8, "vision_config": vision | more}
        (tower / "config.json").write_text(json.dumps(config))
        weights = {f"vision_model.{key}": value for key, value in encoder.state_dict().items()}
        # They have a text encoder and this too.
        torch.save({**weights, "logit_scale": torch.tensor(2.6)}, tower / "pytorch_model.bin")
        values[f"mm_{kind}_tower"] = str(tower)
    model = VideoLlavaLlamaForCausalLM(VideoLlavaLlamaForCausalLM.config_class(**values))
    scale_up(model)
    for tower in model.towers().values():
        tower.load_model()
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    if not towers_inside:
        weights = {key: value for key, value in weights.items() if "_tower." not in key}
    config = {**values, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scale_up(model: torch.nn.Module) -> None:
    """Larger random weights than at initialisation, so that attention and logits are far from uniform."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)


def write_hub_tower(folder: Path, vision: dict[str, Any]) -> None:
    """An encoder as OpenAI's and Google's on the hub: text encoder, its config and an old buffer come with it."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 8}
    config_class, model_class = {
        "clip_vision_model": (CLIPConfig, CLIPModel),
        "siglip_vision_model": (SiglipConfig, SiglipModel),
    }[vision["model_type"]]
    model = model_class(config_class(vision_config=vision, text_config=text))
    scale_up(model)
    positions = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    write_tower(folder, vision, {**model.state_dict(), **positions})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


def write_qwen_tokenizer(folder: Path) -> None:
    """A tokenizer as Qwen's: bytes, no beginning-of-sequence token, ``tokenizer.json``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def edit_config(folder: Path, *removed: str, **changes: Any) -> None:
    """Change fields of ``config.json``, or remove them."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in removed}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Put other weights into ``model.safetensors``, made from those in it."""
    path = folder / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(path).items()}  # not views of the file
    save_file(change(weights), path, metadata={"format": "pt"})


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """An image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file's content."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(count: int, seed: int = 0, edge: int = 56) -> torch.Tensor:
    """Images of noise as a model takes them: (count, 3, edge, edge)."""
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


def spoilt_pixels(value: float) -> torch.Tensor:
    """Two such images, of which the second has one pixel of this value."""
    images = pixels(2)
    images[1, 0, 0, 0] = value
    return images

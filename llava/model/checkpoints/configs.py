"""A checkpoint's config: of which class the model is, and what else lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llava.model import (
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaQwenForCausalLM,
    MGMLlamaForCausalLM,
    VideoLlavaLlamaForCausalLM,
)
from llava.model.checkpoints.files import checkpoint_path, find_file, first_file, has_weights

_MODELS = {
    "LlavaLlamaForCausalLM": LlavaLlamaForCausalLM,
    "LlavaMistralForCausalLM": LlavaMistralForCausalLM,
    "LlavaQwenForCausalLM": LlavaQwenForCausalLM,
    "MGMLlamaForCausalLM": MGMLlamaForCausalLM,
    "MiniGeminiLlamaForCausalLM": MGMLlamaForCausalLM,  # early uploads
    "VideoLlavaLlamaForCausalLM": VideoLlavaLlamaForCausalLM,
}
_MODEL_TYPES = {
    "llava": LlavaLlamaForCausalLM,  # early uploads of LLaVA-1.5
    "llava_llama": LlavaLlamaForCausalLM,
    "llava_mistral": LlavaMistralForCausalLM,
    "llava_qwen": LlavaQwenForCausalLM,
    "mgm": MGMLlamaForCausalLM,
}
_PLAIN_BACKBONES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_BESIDE_ADAPTER_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
TOWER_FIELDS = ("mm_vision_tower", "mm_vision_tower_aux", "mm_image_tower", "mm_video_tower")


def checkpoint_parts(model_path: str, model_base: str | None) -> tuple[bool, str | None]:
    """What is in ``model_path``: whether a LoRA adapter, and the file of weights that go over those of the base.

    Raises:
        ValueError: it needs ``model_base`` and there is none, or the other way round.
    """
    is_local = Path(model_path).is_dir()
    adapter = find_file(model_path, "adapter_config.json") is not None
    complete = is_local and has_weights(model_path)
    if adapter and model_base is None:
        raise ValueError(f"{model_path} holds a LoRA adapter: give the model it was trained on as model_base")
    extra_file = None
    if adapter:
        extra_file = first_file(model_path, _BESIDE_ADAPTER_FILES)
    elif not complete and (model_base or is_local):
        extra_file = first_file(model_path, _PROJECTOR_FILES)
        if extra_file and model_base is None:
            raise ValueError(f"{model_path} holds a projector only: give its language model as model_base")
    if model_base and not adapter and extra_file is None:
        raise ValueError(
            f"model_base={model_base!r} was given, but {model_path} is no LoRA adapter (adapter_config.json) and not "
            f"just a projector ({' or '.join(_PROJECTOR_FILES)}): leave model_base out for a full checkpoint"
        )
    return adapter, extra_file


def read_config(model_path: str, model_name: str | None = None) -> tuple[type, PretrainedConfig]:
    """A LLaVA's class and its config. Older uploads have a model_type that is transformers' own now.

    Args:
        model_path: folder or hub name.
        model_name: a hint where the config is silent.

    Raises:
        OSError: the config is missing or damaged.
        ValueError: it is not an original LLaVA's.
    """
    values = config_values(model_path)
    architecture = next(iter(values.get("architectures") or []), None)
    model_type = values.pop("model_type", None)
    model_class = _MODELS.get(architecture)
    if model_class is None and architecture in (None, *_PLAIN_BACKBONES):
        hint = next((kind for kind in ("mistral", "qwen") if kind in (model_name or "").lower()), "llama")
        model_class = _MODEL_TYPES.get(model_type) or _MODEL_TYPES[f"llava_{hint}"]
    if model_class is LlavaLlamaForCausalLM and values.get("mm_video_tower"):
        model_class = VideoLlavaLlamaForCausalLM  # its checkpoints have the names of LLaVA-1.5's
    first = [values.get(field) for field in TOWER_FIELDS if field != "mm_vision_tower_aux"]  # that one is a second
    if model_class is None or not any(first):
        raise ValueError(
            f"{model_path} is not an original LLaVA checkpoint (architecture {architecture!r}, model_type "
            f"{model_type!r}, mm_vision_tower {values.get('mm_vision_tower')!r}): supported are {', '.join(_MODELS)} "
            "with an mm_vision_tower, such as liuhaotian/llava-v1.5-7b, or what `visionzip convert SRC DST "
            "--to original` makes of one of transformers"
        )
    config = model_class.config_class.from_dict(values)
    config._name_or_path = str(model_path)
    return model_class, config


def config_values(model_path: str) -> dict[str, Any]:
    """A checkpoint's ``config.json``, of either layout.

    Raises:
        OSError: it is missing or damaged.
    """
    model_path = checkpoint_path(model_path)
    if Path(model_path).is_dir() and not (Path(model_path) / "config.json").is_file():
        raise FileNotFoundError(f"{model_path} has no config.json: copy the one that belongs to its weights there")
    try:
        return PretrainedConfig.get_config_dict(model_path)[0]
    except OSError as error:
        reason = " ".join(str(error).split())  # of several lines
        raise OSError(
            f"cannot read the config of {model_path}: it is damaged, or neither a folder here nor to be had from the "
            f"hub. Check the name and the connection, or download it and give its folder. ({reason})"
        ) from error

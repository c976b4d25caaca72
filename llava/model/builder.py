"""``load_pretrained_model``: every layout in which LLaVA checkpoints come, through one function."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaQwenForCausalLM
from llava.model.loading import check_shards, load_weights
from llava.model.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_MODELS = {
    "LlavaLlamaForCausalLM": LlavaLlamaForCausalLM,
    "LlavaMistralForCausalLM": LlavaMistralForCausalLM,
    "LlavaQwenForCausalLM": LlavaQwenForCausalLM,
}
_MODEL_TYPES = {
    "llava": LlavaLlamaForCausalLM,  # early uploads of LLaVA-1.5
    "llava_llama": LlavaLlamaForCausalLM,
    "llava_mistral": LlavaMistralForCausalLM,
    "llava_qwen": LlavaQwenForCausalLM,
}
_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_NOT_QUANTIZED = ["vision_tower", "mm_projector", "lm_head"]


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | None = None,
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedTokenizerBase, Any, Any, int]:
    """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint, in any of its layouts; ready to generate.

    Args:
        model_path: folder or hub name of a full checkpoint in the original layout (safetensors or .bin, one file or
            shards), of a projector (``mm_projector.bin`` or ``.safetensors`` with a config), or of a LoRA adapter.
        model_base: for a projector or an adapter: the checkpoint that it completes (a language model or a LLaVA).
        model_name: as LLaVA has it; here the checkpoint's own config decides, so it is only a hint where that is silent.
        load_8bit: quantise the language model to 8 bits (needs bitsandbytes).
        load_4bit: the same to 4 bits (NF4, double quantisation).
        device_map: for accelerate; ``"auto"`` spreads the model over the GPUs.
        device: ``"cuda"``, ``"cpu"``, …; None takes CUDA if there is any. Anything but CUDA overrides ``device_map``.
        use_flash_attn: short for ``attn_implementation="flash_attention_2"``.
        **kwargs: for ``from_pretrained``. ``torch_dtype`` (or ``dtype``) holds for the vision tower too; it defaults to
            float16 on CUDA and float32 elsewhere. ``attn_implementation`` holds for the tower too.

    Returns:
        tokenizer, model, image_processor and context_len (tokens). A checkpoint that was saved zipped is zipped.

    Raises:
        FileNotFoundError: the folder, or shards of it, are missing.
        ValueError: the checkpoint is not an original LLaVA one, its weights do not fit, or it needs ``model_base``.
        ImportError: a library that the layout needs (peft, bitsandbytes) is not installed; the message says which.
    """
    for path in filter(None, (model_path, model_base)):
        _check_folder(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} was asked for but this machine has no CUDA: use device='cpu'")
    options = {
        "device_map": device_map if device == "cuda" else {"": device},
        "dtype": _dtype(kwargs, device),
        **kwargs,
    }
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if load_8bit or load_4bit:
        options["quantization_config"] = _quantization(load_8bit, load_4bit, options["dtype"])

    model_class, config = _read_config(model_path, model_name)
    adapter = _is_local(model_path, "adapter_config.json")
    projector = next((Path(model_path) / name for name in _PROJECTOR_FILES if _is_local(model_path, name)), None)
    if model_base is None:
        if adapter:
            raise ValueError(f"{model_path} holds a LoRA adapter: give the model it was trained on as model_base")
        if projector and not any(Path(model_path).glob("*model*.safetensors")) and not list(
            Path(model_path).glob("pytorch_model*.bin")
        ):
            raise ValueError(f"{model_path} holds a projector only: give its language model as model_base")
        model = model_class.from_pretrained(model_path, config=config, **options)
    elif adapter:
        model = _load_lora(model_class, model_path, model_base, config, options)
    elif projector:
        extra = {_with_prefix(key): value for key, value in load_weights(projector).items()}
        model = model_class.from_pretrained(model_base, config=config, extra_weights=extra, **options)
    else:
        raise ValueError(
            f"model_base was given, but {model_path} holds neither a LoRA adapter (adapter_config.json) nor a projector "
            f"({' or '.join(_PROJECTOR_FILES)}): leave model_base out for a full checkpoint"
        )

    tokenizer = load_tokenizer(model_base or model_path)
    _add_image_tokens(model, tokenizer)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    context_len = getattr(model.config, "max_sequence_length", 2048)
    return tokenizer, model, model.get_vision_tower().image_processor, context_len


def _check_folder(path: str) -> None:
    if Path(path).is_dir():
        check_shards(path)
    elif str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise FileNotFoundError(f"no model folder at {path} (a hub name has the form owner/name)")


def _is_local(folder: str, name: str) -> bool:
    return (Path(folder) / name).is_file()


def _dtype(kwargs: dict[str, Any], device: str) -> torch.dtype:
    given = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    kwargs.pop("torch_dtype", None)
    return given or (torch.float16 if device.startswith("cuda") else torch.float32)


def _quantization(load_8bit: bool, load_4bit: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other: choose one")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError("load_8bit and load_4bit need bitsandbytes: pip install bitsandbytes") from error
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )


def _read_config(model_path: str, model_name: str | None) -> tuple[type, PretrainedConfig]:
    """The model's class and its config. Older uploads have a model_type that is transformers' own now."""
    values, _ = PretrainedConfig.get_config_dict(model_path)
    architecture = next(iter(values.get("architectures") or []), None)
    model_type = values.pop("model_type", None)
    model_class = _MODELS.get(architecture)
    if model_class is None and architecture in (None, *_PLAIN_BACKBONES):
        hint = next((kind for kind in ("mistral", "qwen") if kind in (model_name or "").lower()), "llama")
        model_class = _MODEL_TYPES.get(model_type) or _MODEL_TYPES[f"llava_{hint}"]
    if model_class is None or not values.get("mm_vision_tower"):
        raise ValueError(
            f"{model_path} is not an original LLaVA checkpoint (architecture {architecture!r}, model_type "
            f"{model_type!r}, mm_vision_tower {values.get('mm_vision_tower')!r}): supported are {', '.join(_MODELS)} "
            "with an mm_vision_tower, such as liuhaotian/llava-v1.5-7b (not the llava-hf conversions)"
        )
    config = model_class.config_class.from_dict(values)
    config._name_or_path = str(model_path)
    return model_class, config


_PLAIN_BACKBONES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def _with_prefix(key: str) -> str:
    return key if key.startswith("model.") else f"model.{key}"


def _load_lora(
    model_class: type, model_path: str, model_base: str, config: PretrainedConfig, options: dict[str, Any]
) -> Any:
    """Base, then what was trained beside the adapter (the projector), then the adapter, merged."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("a LoRA checkpoint needs peft: pip install peft") from error
    extra = {}
    for name in ("non_lora_trainables.safetensors", "non_lora_trainables.bin"):
        if _is_local(model_path, name):
            extra = load_weights(Path(model_path) / name)
            break
    extra = {_with_prefix(key.removeprefix("base_model.").removeprefix("model.")): v for key, v in extra.items()}
    model = model_class.from_pretrained(model_base, config=config, extra_weights=extra, **options)
    logger.info("merging the LoRA adapter of %s", model_path)
    return PeftModel.from_pretrained(model, model_path).merge_and_unload().eval()


def _add_image_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the marker tokens that the checkpoint was trained with, if any."""
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model.config, "mm_use_im_patch_token", True) else []
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    added = tokenizer.add_tokens(tokens, special_tokens=True)
    # Never shrink: many vocabularies are padded beyond the tokenizer's.
    if added and len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))

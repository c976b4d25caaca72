"""``load_pretrained_model``: every layout in which LLaVA checkpoints come, through one function."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoints.adapters import check_adapter, merge_adapter
from llava.model.checkpoints.configs import TOWER_FIELDS, checkpoint_parts, config_values, read_config
from llava.model.checkpoints.files import checkpoint_path, find_file, load_weights
from llava.model.checkpoints.loading import check_device, check_finite_weights
from llava.model.multimodal_encoder.builder import build_towers
from llava.model.multimodal_encoder.tower_files import resolve_tower_path
from llava.model.stock.loading import is_transformers, load_transformers_model
from llava.model.tokenizer import load_tokenizer

# Names of modules, with all that is in them.
_NOT_QUANTIZED = [
    "model.vision_tower",
    "model.vision_tower_aux",
    "model.image_tower",
    "model.video_tower",
    "model.mm_projector",
    "model.multi_modal_projector",
    *(f"model.vlm_uni_{name}_projector" for name in ("query", "aux", "val")),
    "lm_head",
]


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
    """Load a LLaVA-1.5, LLaVA-NeXT, Video-LLaVA or Mini-Gemini checkpoint, in any of its layouts; ready to generate.

    Args:
        model_path: folder or hub name of a full checkpoint in the original layout (safetensors or .bin, one file or
            shards) or in transformers' (``llava-hf/…``; see :mod:`llava.model.stock.transformers_llava`), of a
            projector (``mm_projector.bin`` or ``.safetensors`` with a config), or of a LoRA adapter.
        model_base: for a projector or an adapter: the checkpoint that it completes (a language model or a LLaVA).
        model_name: as LLaVA has it; here the checkpoint's config decides, and this is a hint where that is silent.
        load_8bit: quantise the language model to 8 bits (needs bitsandbytes).
        load_4bit: the same to 4 bits (NF4, double quantisation).
        device_map: for accelerate; ``"auto"`` spreads the model over the GPUs, None leaves it where it is read, for
            someone else to move it (training).
        device: ``"cuda"``, ``"cpu"``, …; None takes CUDA if there is any. Anything but CUDA overrides a ``device_map``.
        use_flash_attn: short for ``attn_implementation="flash_attention_2"``.
        **kwargs: for ``from_pretrained``. ``torch_dtype`` (or ``dtype``) holds for the vision tower too; it defaults to
            float16 on CUDA and float32 elsewhere. ``attn_implementation`` holds for the tower too.

    Returns:
        tokenizer, model, image_processor and context_len (tokens). A checkpoint that was saved zipped is zipped.

    Raises:
        OSError: a folder or file is missing or damaged, or cannot be had from the hub.
        ValueError: the checkpoint is not an original LLaVA one, its weights do not fit, or it needs ``model_base``.
        ImportError: a library that the layout needs (peft, bitsandbytes) is not installed; the message says which.
    """
    model_path = checkpoint_path(model_path)
    model_base = model_base and checkpoint_path(model_base)
    device = check_device(str(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    options = _options(kwargs, device, device_map, use_flash_attn, load_8bit, load_4bit)

    # All that can be wrong is looked at before the weights are fetched and read, which takes minutes.
    if is_transformers(config_values(model_path)):
        if model_base:
            raise ValueError(f"{model_path} is a whole checkpoint in transformers' layout: leave model_base out")
        return load_transformers_model(model_path, **options)
    model_class, config = read_config(model_path, model_name)
    if model_base and find_file(model_base, "config.json") and is_transformers(config_values(model_base)):
        raise ValueError(
            f"model_base={model_base!r} is in transformers' layout: convert it with `visionzip convert SRC DST --to "
            f"original`, for {model_path} to be put on it"
        )
    adapter, extra_file = checkpoint_parts(model_path, model_base)
    tokenizer = load_tokenizer(model_base or model_path)
    with torch.device("meta"):
        tower = next(iter(build_towers(config, delay_load=True).values()))
        adapter_config = check_adapter(model_class(copy.deepcopy(config)), model_path) if adapter else None
    image_processor = tower.image_processor
    extra = {_own_name(key): value for key, value in load_weights(extra_file).items()} if extra_file else {}
    check_finite_weights(extra, extra_file or "")
    if model_base:  # a relative folder is inside model_path, not the base
        for field in TOWER_FIELDS:
            if getattr(config, field, None):
                setattr(config, field, resolve_tower_path(getattr(config, field), config))
    model = model_class.from_pretrained(model_base or model_path, config=config, extra_weights=extra, **options)
    if adapter:
        model = merge_adapter(model, model_path, adapter_config)
    model.get_vision_tower().image_processor = image_processor
    _add_image_tokens(model, tokenizer)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    context_len = getattr(model.config, "max_sequence_length", 2048)
    return tokenizer, model, image_processor, context_len


def _options(
    kwargs: dict[str, Any], device: str, device_map: Any, use_flash_attn: bool, load_8bit: bool, load_4bit: bool
) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    options = {
        "device_map": device_map if device == "cuda" or device_map is None else {"": device},
        "dtype": _dtype(kwargs, device),
        **kwargs,
    }
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if load_8bit or load_4bit:
        options["quantization_config"] = _quantization(load_8bit, load_4bit, options["dtype"])
    return options


def _dtype(kwargs: dict[str, Any], device: str) -> torch.dtype | str:
    old_name = kwargs.pop("torch_dtype", None)
    return kwargs.pop("dtype", None) or old_name or (torch.float16 if device.startswith("cuda") else torch.float32)


def _quantization(load_8bit: bool, load_4bit: bool, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other: choose one")
    try:
        import bitsandbytes  # noqa: F401, PLC0415 - optional
    except ImportError as error:
        raise ImportError("load_8bit and load_4bit need bitsandbytes: pip install bitsandbytes") from error
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
        bnb_4bit_compute_dtype=torch.float16 if dtype == "auto" else dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )


def _own_name(key: str) -> str:
    """The model's name of a weight in a projector or LoRA folder: peft puts more in front, some files leave it out."""
    key = key.removeprefix("base_model.").removeprefix("model.").removeprefix("model.")
    return key if key.startswith("lm_head.") else f"model.{key}"


def _add_image_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the marker tokens that the checkpoint was trained with, if any."""
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model.config, "mm_use_im_patch_token", True) else []
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    added = tokenizer.add_tokens(tokens, special_tokens=True)
    # Never shrink: many vocabularies are padded beyond the tokenizer's.
    if added and len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

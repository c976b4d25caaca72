"""``load_pretrained_model``: every layout in which LLaVA checkpoints come, through one function."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model import (
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaQwenForCausalLM,
    MGMLlamaForCausalLM,
    VideoLlavaLlamaForCausalLM,
)
from llava.model.loading import (
    check_device,
    check_finite_weights,
    checkpoint_path,
    find_file,
    has_weights,
    load_weights,
)
from llava.model.multimodal_encoder.builder import build_towers
from llava.model.multimodal_encoder.vision_tower import resolve_tower_path
from llava.model.tokenizer import load_tokenizer
from llava.model.transformers_llava import is_transformers, load_transformers_model

logger = logging.getLogger(__name__)

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
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_ADAPTER_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
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
TOWER_FIELDS = ("mm_vision_tower", "mm_vision_tower_aux", "mm_image_tower", "mm_video_tower")


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
            shards) or in transformers' (``llava-hf/…``; see :mod:`llava.model.transformers_llava`), of a projector
            (``mm_projector.bin`` or ``.safetensors`` with a config), or of a LoRA adapter.
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
    options = {
        "device_map": device_map if device == "cuda" or device_map is None else {"": device},
        "dtype": _dtype(kwargs, device),
        **kwargs,
    }
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if load_8bit or load_4bit:
        options["quantization_config"] = _quantization(load_8bit, load_4bit, options["dtype"])

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
        adapter_config = _check_adapter(model_class(copy.deepcopy(config)), model_path) if adapter else None
    image_processor = tower.image_processor
    extra = {_own_name(key): value for key, value in load_weights(extra_file).items()} if extra_file else {}
    check_finite_weights(extra, extra_file or "")
    if model_base:  # a relative folder is inside model_path, not the base
        for field in TOWER_FIELDS:
            if getattr(config, field, None):
                setattr(config, field, resolve_tower_path(getattr(config, field), config))
    model = model_class.from_pretrained(model_base or model_path, config=config, extra_weights=extra, **options)
    if adapter:
        model = _merge_adapter(model, model_path, adapter_config)
    model.get_vision_tower().image_processor = image_processor
    _add_image_tokens(model, tokenizer)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    context_len = getattr(model.config, "max_sequence_length", 2048)
    return tokenizer, model, image_processor, context_len


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
        extra_file = _first_file(model_path, _BESIDE_ADAPTER_FILES)
    elif not complete and (model_base or is_local):
        extra_file = _first_file(model_path, _PROJECTOR_FILES)
        if extra_file and model_base is None:
            raise ValueError(f"{model_path} holds a projector only: give its language model as model_base")
    if model_base and not adapter and extra_file is None:
        raise ValueError(
            f"model_base={model_base!r} was given, but {model_path} is no LoRA adapter (adapter_config.json) and not "
            f"just a projector ({' or '.join(_PROJECTOR_FILES)}): leave model_base out for a full checkpoint"
        )
    return adapter, extra_file


def _first_file(path: str, names: tuple[str, ...]) -> str | None:
    return next(filter(None, (find_file(path, name) for name in names)), None)


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


def _own_name(key: str) -> str:
    """The model's name of a weight in a projector or LoRA folder: peft puts more in front, some files leave it out."""
    key = key.removeprefix("base_model.").removeprefix("model.").removeprefix("model.")
    return key if key.startswith("lm_head.") else f"model.{key}"


def _check_adapter(model: Any, path: str) -> Any:
    """Check that a LoRA adapter fits the model, which peft does only in part.

    Args:
        model: on the meta device; it is changed.
        path: the adapter.

    Returns:
        The adapter's config.

    Raises:
        FileNotFoundError: its weights are missing.
        ImportError: peft is not installed.
        ValueError: a weight is missing, not part of the model, or of another shape.
    """
    try:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("a LoRA checkpoint needs peft: pip install peft") from error
    if (file := _first_file(path, _ADAPTER_FILES)) is None:
        raise FileNotFoundError(
            f"{path} has an adapter_config.json but no {' or '.join(_ADAPTER_FILES)}: copy it there"
        )
    found = {key: tuple(value.shape) for key, value in load_weights(file, "meta").items()}
    config = PeftConfig.from_pretrained(path)
    if config.exclude_modules is None and not any("_tower." in key for key in found):
        # LLaVA attaches the adapter before the towers, which have layers of the same names (q_proj, …).
        config.exclude_modules = r".*_tower\b.*"
    own = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    expected = {key: tuple(value.shape) for key, value in own.items()}
    if wrong := sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)):
        raise ValueError(
            f"the LoRA adapter in {path} does not fit the model of its config.json: {len(wrong)} weights are missing, "
            f"not part of the model, or of another shape, such as {', '.join(wrong[:3])}"
        )
    return config


def _merge_adapter(model: Any, path: str, config: Any) -> Any:
    from peft import PeftModel  # noqa: PLC0415

    logger.info("merging the LoRA adapter of %s", path)
    adapted = PeftModel.from_pretrained(model, path, config=config)
    check_finite_weights({name: value for name, value in adapted.named_parameters() if "lora_" in name}, path)
    return adapted.merge_and_unload().eval()


def _add_image_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the marker tokens that the checkpoint was trained with, if any."""
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model.config, "mm_use_im_patch_token", True) else []
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    added = tokenizer.add_tokens(tokens, special_tokens=True)
    # Never shrink: many vocabularies are padded beyond the tokenizer's.
    if added and len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

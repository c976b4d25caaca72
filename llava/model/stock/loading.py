"""Checkpoints in transformers' layout: which they are, and loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from llava.model.checkpoints.files import has_weights, weight_shapes
from llava.model.checkpoints.layouts import KINDS, TOWERS, Kind
from llava.model.checkpoints.loading import OBSOLETE, check_finite_weights, no_load_report
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.stock.transformers_llava import TransformersLlava, llava_config
from llava.model.tokenizer import load_tokenizer
from visionzip import visionzip


def is_transformers(values: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is in transformers' layout (early uploads of LLaVA-1.5 share its ``model_type``)."""
    return {"text_config", "vision_config"} <= values.keys() and "mm_vision_tower" not in values


def load_transformers_model(model_path: str, **options: Any) -> tuple[PreTrainedTokenizerBase, Any, Any, int]:
    """Load a checkpoint in transformers' layout; a zipped one is zipped.

    Args:
        model_path: folder or hub name.
        **options: for ``from_pretrained``.

    Returns:
        tokenizer, :class:`TransformersLlava`, image_processor and context_len (tokens).

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the model is of a family that is not supported here, the weights do not fit it, or the
            projector's are not finite.
    """
    values, _ = PretrainedConfig.get_config_dict(model_path)
    name, encoder = values.get("model_type"), values["vision_config"].get("model_type")
    if (kind := KINDS.get(name)) is None or encoder not in TOWERS:
        raise ValueError(
            f"{model_path} is a transformers model of type {name!r} with a vision tower of type {encoder!r}: supported "
            f"are {', '.join(KINDS)} with {' or '.join(TOWERS)}"
        )
    if Path(model_path).is_dir() and has_weights(model_path):
        weight_shapes(model_path)  # says which file is missing or damaged
    tokenizer, image_processor = load_tokenizer(model_path), _image_processor(model_path, kind)
    with no_load_report():
        native, info = getattr(transformers, kind.model).from_pretrained(
            model_path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    unexpected = {key for key in info["unexpected_keys"] if not OBSOLETE.search(key)}
    if wrong := sorted({*info["missing_keys"], *unexpected, *(entry[0] for entry in info["mismatched_keys"])}):
        raise ValueError(
            f"the weights in {model_path} do not fit {kind.model}: {len(wrong)} are missing, not part of it, or of "
            f"another shape, such as {', '.join(wrong[:3])}. The checkpoint is incomplete or its config.json belongs "
            "to another model; download it again"
        )
    check_finite_weights({key: value for key, value in native.named_parameters() if "projector" in key}, model_path)
    if native.generation_config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        native.generation_config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    model = TransformersLlava(native).eval()
    model.get_vision_tower().image_processor = image_processor
    if getattr(native.config, "visionzip", None):
        visionzip(model)
    return tokenizer, model, image_processor, model.config.max_position_embeddings


def _image_processor(path: str, kind: Kind) -> Any:
    if kind.processor:
        processor_class = getattr(transformers, kind.processor)
    else:
        with torch.device("meta"):
            tower = build_vision_tower(llava_config(AutoConfig.from_pretrained(path)), delay_load=True)
        processor_class = tower.processor_class
    try:
        return processor_class.from_pretrained(path)
    except OSError as error:
        raise OSError(
            f"{path} has no image processor that can be read: copy preprocessor_config.json or processor_config.json "
            f"there, as the checkpoint has it. ({error})"
        ) from error

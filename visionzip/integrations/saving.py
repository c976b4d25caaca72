"""Save a zipped model of transformers with the names of weights that inference engines read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def save_pretrained(
    model: nn.Module,
    towers: tuple[str, ...],
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Save a model so that stock vLLM loads it too; this replaces the model's ``save_pretrained``.

    transformers 5 leaves ``vision_model.`` out of the names if the encoder was built anew or loaded without it. The
    checkpoints of llava-hf have it, and vLLM's loader needs it; transformers reads both to the same bits. The names
    stay transformers' own for adapters, for offloaded weights, and if ``save_original_format=False`` asks for them.

    Args:
        model: the zipped model.
        towers: the attributes of its base model that hold image encoders.
        save_directory: the directory, as in transformers.
        is_main_process: whether this process writes, as in transformers.
        state_dict: the weights to save in place of the model's, as in transformers.
        **kwargs: the other arguments of transformers.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    own_names = adapters or not kwargs.get("save_original_format", True) or kwargs.get("distributed_checkpoint")
    if not own_names and not any(value.is_meta for value in weights.values()):
        state_dict = {_long_name(name, towers): value for name, value in weights.items()}
    return type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **kwargs)


def _long_name(name: str, towers: tuple[str, ...]) -> str:
    for tower in towers:
        prefix = f"model.{tower}."
        if name.startswith(prefix) and not name.startswith(f"{prefix}vision_model."):
            return f"{prefix}vision_model.{name.removeprefix(prefix)}"
    return name

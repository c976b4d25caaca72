"""LoRA adapters: checked against their model, and merged into it."""

from __future__ import annotations

import logging
from typing import Any

from llava.model.checkpoints.files import first_file, load_weights
from llava.model.checkpoints.loading import check_finite_weights

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def check_adapter(model: Any, path: str) -> Any:
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
    if (file := first_file(path, _ADAPTER_FILES)) is None:
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


def merge_adapter(model: Any, path: str, config: Any) -> Any:
    """The model with the adapter of a folder in its weights; ``config`` is what :func:`check_adapter` returns.

    Raises:
        ValueError: a weight of the adapter is not finite.
    """
    from peft import PeftModel  # noqa: PLC0415

    logger.info("merging the LoRA adapter of %s", path)
    adapted = PeftModel.from_pretrained(model, path, config=config)
    check_finite_weights({name: value for name, value in adapted.named_parameters() if "lora_" in name}, path)
    return adapted.merge_and_unload().eval()

"""Loading that fails loudly: every weight of the model has to come from somewhere, every one of the file has to go."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_TOWER = "model.vision_tower."
_ENCODER = _TOWER + "vision_tower.vision_model."
# Buffers that older transformers saved with the weights; they are computed now.
_OBSOLETE = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


def settle_weights(model: Any, info: dict[str, Any], extra_weights: dict[str, Tensor]) -> None:
    """Complete a model that transformers has just loaded, and refuse one that would be partly random.

    Args:
        model: a LLaVA model.
        info: transformers' loading info.
        extra_weights: weights by name, put over the loaded ones.

    Raises:
        ValueError: weights are missing, unexpected, or of another shape; the message names them.
    """
    missing = set(info["missing_keys"]) - set(extra_weights)
    unexpected = {key for key in info["unexpected_keys"] if not _OBSOLETE.search(key)}
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    parameters = dict(model.named_parameters())
    for key, value in extra_weights.items():
        if key not in parameters:
            unexpected.add(key)
        elif parameters[key].shape != value.shape:
            mismatched.add(f"{key} (model {tuple(parameters[key].shape)}, file {tuple(value.shape)})")
        else:
            mismatched.discard(key)
            with torch.no_grad():
                parameters[key].copy_(value)
    tower = model.get_vision_tower()
    if tower is not None:
        needed = {key for key in parameters if key.startswith(_ENCODER) and tower.needs(key.removeprefix(_ENCODER))}
        if needed <= missing:  # the checkpoint has no tower of its own
            tower.load_model()
            missing = {key for key in missing if not key.startswith(_TOWER)}
        else:
            tower.is_loaded = True
            missing = {key for key in missing if not key.startswith(_ENCODER) or key in needed}
    problems = [
        f"{len(keys)} {problem}, such as {', '.join(sorted(keys)[:3])}"
        for problem, keys in (
            ("missing from the checkpoint", missing),
            ("not part of the model", unexpected),
            ("of another shape than the model's", mismatched),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit {type(model).__name__}: {'; '.join(problems)}. The folder is incomplete or its "
            "config.json belongs to another model; a projector or LoRA alone needs model_base"
        )


def check_shards(folder: str | Path) -> None:
    """Check that a local checkpoint has all the files that its index names.

    Raises:
        FileNotFoundError: some are missing; the message lists them.
    """
    for index in Path(folder).glob("*.index.json"):
        names = set(json.loads(index.read_text())["weight_map"].values())
        if absent := sorted(name for name in names if not (Path(folder) / name).is_file()):
            raise FileNotFoundError(
                f"{folder} is incomplete: {len(absent)} of {len(names)} shards named in {index.name} are missing "
                f"({', '.join(absent)}): download them again"
            )


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of one ``.safetensors`` or ``.bin`` file, on the CPU."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)

"""What a run leaves: the learnt weights in LLaVA's files, also as checkpoints; and whether the disk has room."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainingArguments

from llava.model.checkpoints.files import load_weights
from llava.model.checkpoints.loading import check_finite_weights, gathered
from llava.storage.folders import whole_files
from llava.train.model import learnt

_BESIDE = "non_lora_trainables.bin"
_ADAPTER = "adapter_model.safetensors"
_OPTIMIZER_BYTES = 12  # for each learnt number: two moments of AdamW and, with DeepSpeed, a float32 copy


def gather_learnt(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole, on the CPU. With ZeRO-3 all processes must call this."""
    weights = {}
    for name, parameter in learnt(model).items():
        with gathered([parameter]):
            weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return weights


def save_learnt(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write what was learnt of a model, so that ``load_pretrained_model(folder, model_base)`` loads it.

    The names are LLaVA's: ``mm_projector.bin``, and the same as ``.safetensors``; of a LoRA model the adapter in peft's
    files and ``non_lora_trainables.bin``. With them go ``config.json`` and the image processor.

    Args:
        model: with its config; only one process writes.
        weights: from :func:`gather_learnt`.
        folder: made if it is missing.

    Raises:
        OSError: a file cannot be written; those of the same name stay as they are.
    """
    with whole_files(folder) as unfinished:
        if hasattr(model, "peft_config"):
            beside = {name: value for name, value in weights.items() if "lora_" not in name}
            torch.save(beside, unfinished / _BESIDE)
            model.save_pretrained(unfinished, state_dict=weights, save_embedding_layers=False)
            model = model.get_base_model()
        else:
            save_file(weights, unfinished / "mm_projector.safetensors", metadata={"format": "pt"})
            torch.save(weights, unfinished / "mm_projector.bin")
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of the base as it was trained with; how it is loaded is up to its user
        config.save_pretrained(unfinished)
        model.get_vision_tower().image_processor.save_pretrained(unfinished)  # the base's folder may be all that has it


def load_learnt(model: Any, folder: Path) -> None:
    """Put what :func:`save_learnt` has written back into the model.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the weights are not finite.
    """
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict  # noqa: PLC0415 - optional

        set_peft_model_state_dict(model, load_weights(folder / _ADAPTER))
        weights = load_weights(folder / _BESIDE)
    else:
        weights = load_weights(folder / "mm_projector.safetensors")
    check_finite_weights(weights, folder)
    own = learnt(model)
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def check_room(model: Any, training: TrainingArguments, samples: int, learns_part: bool) -> None:
    """Check that the disk can hold what the run will write.

    Args:
        model: what is learnt of it requires gradients.
        training: says where, and how many checkpoints.
        samples: records of an epoch.
        learns_part: outputs have only what is learnt, else the whole model.

    Raises:
        OSError: it cannot.
    """
    part = sum(_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    saved = 2 * 4 * part if learns_part else sum(_size(p) * p.element_size() for p in model.parameters())
    needed = saved + _checkpoints(training, samples) * (saved + _OPTIMIZER_BYTES * part)
    folder = Path(training.output_dir)
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    # A run that goes on has written some of it.
    there = sum(file.stat().st_size for file in folder.glob("checkpoint-*/**/*") if file.is_file())
    if free + there < needed:
        raise OSError(
            f"{folder} has {free / 2**30:.2f} GiB free, but this run's checkpoints and results will take about "
            f"{needed / 2**30:.2f} GiB: make room, choose another output_dir, or keep fewer checkpoints "
            "(save_total_limit, save_strategy no)"
        )


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves none of it here


def _checkpoints(training: TrainingArguments, samples: int) -> int:
    """The most checkpoints that lie there at one time."""
    batch = training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps
    steps = training.max_steps if training.max_steps > 0 else samples * training.num_train_epochs / batch
    if training.save_strategy == "no":
        return 0
    if training.save_strategy == "epoch":
        written = math.ceil(training.num_train_epochs)
    else:
        every = training.save_steps if training.save_steps >= 1 else training.save_steps * steps
        written = math.ceil(steps / every)
    # The new one is there before the oldest is taken away.
    return min(written, (training.save_total_limit or written) + 1)

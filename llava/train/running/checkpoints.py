"""Checkpoints of a run that was stopped: which is whole, and whether it is of the run that is to go on there."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

ARGUMENTS = "arguments.json"  # in a checkpoint: what the run's weights follow from
_STATE = "trainer_state.json"
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "adam_beta1", "adam_beta2")
_ORDER = ("group_by_modality_length", "train_sampling_strategy")


def last_checkpoint(folder: str | Path, quiet: bool = True) -> str | None:
    """Find the newest whole checkpoint of a run that was stopped; None for a new one.

    A kill in the middle of a save or a full disk leaves files missing, empty or cut. Each file's own form tells
    (header, directory or brackets), so that this takes no time, however large they are.

    Args:
        folder: the run's.
        quiet: do not say which newer ones are passed over, and why.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        problem = damage(path)
        if problem is None:
            return str(path)
        if not quiet:
            logger.warning("%s is not whole and is passed over: %s", path, problem)
    return None


def damage(checkpoint: Path) -> str | None:
    """What keeps a run from going on at a checkpoint; None if it is whole."""
    names = {file.name for file in checkpoint.iterdir()}
    for name in (_STATE, ARGUMENTS):  # the first is written last of all
        if name not in names:
            return f"{name} is missing"
    if "latest" in names:  # DeepSpeed's
        state = checkpoint / (checkpoint / "latest").read_text().strip()
        for ending in ("model_states.pt", "optim_states.pt"):
            if state == checkpoint or not any(state.glob(f"*{ending}")):
                return f"it has no {state.name}/*{ending}"
    elif not any(name.startswith("optimizer") for name in names):
        return "the optimizer's state is missing"
    return next(filter(None, map(_damage, sorted(checkpoint.rglob("*")))), None)


def _damage(file: Path) -> str | None:
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            raise ValueError("it has no end")
    except Exception as error:  # each reader, and each kind of damage, has its own
        return f"{file.name} ({file.stat().st_size} bytes) is damaged: {error}"
    return None


def check_same_run(checkpoint: str | None, decides: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of the run that is to go on from it.

    Args:
        checkpoint: from :func:`last_checkpoint`.
        decides: what this run's weights follow from; the checkpoint has that of its own. What an older version has not
            written there is not compared.

    Raises:
        ValueError: it is of another run; the message names all that differs.
    """
    if not checkpoint:
        return
    there = json.loads(Path(checkpoint, ARGUMENTS).read_text())
    now = json.loads(json.dumps(decides))  # as a file gives it back: lists for tuples
    if other := [name for name, value in now.items() if name in there and there[name] != value]:
        named = ", ".join(f"{name}={now[name]!r} (there: {there[name]!r})" for name in other)
        raise ValueError(
            f"{checkpoint} is of a run with other arguments, so that this one cannot go on there: {named}. Give those, "
            "or give another output_dir"
        )


def records_digest(records: Sequence[Mapping[str, Any]]) -> str:
    """How many records and a checksum of all that is in them, for people and for :func:`check_same_run`."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode())
    return f"{len(records)}, sha256 {digest.hexdigest()[:16]}"


def what_decides_steps(training: TrainingArguments) -> dict[str, Any]:
    """The samples of an update, their order, the optimizer and its schedule but for its length."""
    batch = training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps
    settings = {name: getattr(training, name) for name in (*_SCHEDULE, *_ORDER) if hasattr(training, name)}
    return {"global_batch": batch, **{name: getattr(value, "value", value) for name, value in settings.items()}}

"""What every training run shares: going on where it stopped, and the record and picture that it leaves."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from transformers import Trainer

from llava.files import write_atomically

CHECKPOINT_ARGUMENTS = "arguments.json"  # in a checkpoint: what the run's weights follow from
_LIBRARIES = ("visionzip", "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Transformers' own, for data sets whose samples are not the model's columns."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False"})


def last_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint of a run that was stopped, None for a new one.

    The Trainer's state is written last: without it the run was stopped while it wrote the checkpoint.
    """
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(map(str, whole), key=lambda path: int(path.rsplit("-", 1)[1]), default=None)


def check_same_run(checkpoint: str | None, decides: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of the run that is to go on from it.

    Args:
        checkpoint: from :func:`last_checkpoint`.
        decides: the arguments that this run's weights follow from; the checkpoint has those of its own.

    Raises:
        ValueError: it is of another run; the message names the arguments that differ.
    """
    file = checkpoint and Path(checkpoint, CHECKPOINT_ARGUMENTS)
    if not file or not file.is_file():
        return
    there = json.loads(file.read_text())
    if other := [name for name, value in decides.items() if there.get(name) != value]:
        named = ", ".join(f"{name}={decides[name]!r} (there: {there.get(name)!r})" for name in other)
        raise ValueError(
            f"{checkpoint} is of a run with other arguments, so that this one cannot go on there: {named}. Give those, "
            "or give another output_dir"
        )


def versions() -> dict[str, str]:
    """Of Python and the libraries in use."""
    names = [name for name in _LIBRARIES if name.partition(".")[0] in sys.modules]
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def finish(trainer: Trainer, arguments: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write ``run.json`` (arguments, versions, losses and other facts) and ``losses.png`` into the run's folder.

    Args:
        trainer: when it has trained.
        arguments: dataclasses by name; the Trainer's own are added.
        facts: what else is to be recorded.
    """
    output = Path(trainer.args.output_dir)
    record = {
        **{name: asdict(values) for name, values in arguments.items()},
        "training": trainer.args.to_sanitized_dict(),
        "batch_per_step": trainer.get_total_train_batch_size(trainer.args),
        "versions": versions(),
        **facts,
        "losses": trainer.state.log_history,
    }
    safe = "The weights in its folder are whole: with room there, the same command writes it"
    write_atomically(output / "run.json", json.dumps(record, indent=1), safe)
    plot_losses({output.name: trainer.state.log_history}, output / "losses.png")


def leave_together() -> None:
    """End a run of several processes: each waits for the others, as one that is left behind would crash."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write loss against step, one panel per run, on a logarithmic axis.

    Args:
        histories: name of each run to its Trainer's ``log_history``.
        path: picture to write.
    """
    columns = min(4, len(histories))
    rows = math.ceil(len(histories) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(histories) :]:
        panel.remove()
    for panel, (name, history) in zip(panels, histories.items(), strict=False):
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        if points:
            panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        panel.grid(alpha=0.3)
    write_atomically(path, partial(figure.savefig, dpi=150, format=path.suffix[1:]))

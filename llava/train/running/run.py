"""What every training run shares: how its command ends, and the record and picture that it leaves."""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser, Trainer

from llava.commands.parsers import Parser, run_command
from llava.storage.files import write_atomically
from visionzip import __version__

_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Transformers' own, for data sets whose samples are not the model's columns."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False"})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "no use here: what is not finite is left out and stops the run if it repeats"}
    )

    def __post_init__(self) -> None:
        """Check the numbers, and have a line for each logged step where no terminal is, not a bar."""
        check_finite(self)
        if self.disable_tqdm is None and not sys.stderr.isatty():
            self.disable_tqdm = True
        super().__post_init__()


class TrainingParser(Parser, HfArgumentParser):
    """Parses the command line of a training into dataclasses; refuses as the other commands do."""

    def __init__(self, kinds: Sequence[type], prog: str, description: str | None) -> None:
        super().__init__(kinds, prog=prog, usage=f"{prog} --FLAG VALUE …", description=description)

    def refuse(self, line: str) -> None:
        """Raise it, for the command to say as it says what else is wrong.

        Raises:
            ValueError: always.
        """
        raise ValueError(line)


def check_finite(arguments: Any) -> None:
    """Check the numbers of a dataclass.

    Raises:
        ValueError: one is infinite or NaN.
    """
    for each in fields(arguments):
        value = getattr(arguments, each.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{each.name} {value} is no finite number")


def check_installed(words: Sequence[str]) -> None:
    """Find what a run needs, in the end or by its flags, before these are parsed: transformers stumbles over DeepSpeed.

    Raises:
        ImportError: the extra ``train`` is not installed.
    """
    needed = ["matplotlib", *(["deepspeed"] if any(word.startswith("--deepspeed") for word in words) else [])]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ImportError(f'training needs {" and ".join(missing)}: pip install "llava-visionzip[train]"')


def versions() -> dict[str, str]:
    """Of Python and the libraries in use."""
    own = {"python": platform.python_version(), "visionzip": __version__}
    return own | {name: metadata.version(name) for name in _LIBRARIES if name in sys.modules}


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


def run_training(name: str, command: Callable[[list[str]], None]) -> int:
    """Run a training's command on this process's arguments, and say in one line what is wrong, if anything is.

    Args:
        name: the module that is run.
        command: gets the words behind it.

    Returns:
        The exit status: 2 for bad input.
    """

    def run(words: list[str]) -> None:
        try:
            command(words)
        except (ValueError, OSError) as error:
            if "in DataLoader worker process" not in str(error):
                raise
            # Of a process that reads data, torch passes on the whole traceback; the reason is its end.
            raise ValueError(re.split(r"\n(?:\w+\.)*\w+Error: ", str(error))[-1].strip()) from error
        leave_together()

    return run_command(name, run, sys.argv[1:])


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
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, see check_installed

    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(histories) :]:
        panel.remove()
    for panel, (name, history) in zip(panels, histories.items(), strict=False):
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        if points:
            panel.plot(*zip(*points, strict=True), linewidth=1)
        has_log = any(loss > 0 for _, loss in points)
        panel.set(title=name, xlabel="step", ylabel="loss", yscale="log" if has_log else "linear")
        panel.grid(alpha=0.3)
    write_atomically(path, partial(figure.savefig, dpi=150, format=path.suffix[1:]))

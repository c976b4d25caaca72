"""Helpers of the tests of training."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.storage.lock import locked_folder

TRAINER = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation in LLaVA's format; the human begins."""
    return [
        {"from": speaker, "value": text}
        for speaker, text in zip(itertools.cycle(["human", "gpt"]), texts, strict=False)
    ]


def command(main: Callable[[], int], **flags: Any) -> int:
    """Exit status of ``python -m llava.train.… --flag value …``."""
    with pytest.MonkeyPatch.context() as patch:
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        patch.setattr(sys, "argv", ["command", *words])
        return main()


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def steps_of(run: Path) -> list[tuple[float, ...]]:
    """What each step was: its number, its loss, its learning rate and the size of its gradient."""
    names = ("step", "loss", "learning_rate", "grad_norm")
    return [tuple(entry[name] for name in names) for entry in record_of(run)["losses"] if "loss" in entry]


def learnt(input_ids: Tensor, labels: Tensor, tokenizer: Any) -> list[str]:
    """The stretches of text that are learnt; labels are the ids themselves there."""
    assert (labels[labels != IGNORE_INDEX] == input_ids[labels != IGNORE_INDEX]).all()
    groups = itertools.groupby(labels.tolist(), key=lambda label: label != IGNORE_INDEX)
    return [tokenizer.decode(list(group)) for is_learnt, group in groups if is_learnt]


def wait_for_the_end(run: Path) -> None:
    """Return when no process writes to a run's folder any more, as its lock tells."""
    end = time.monotonic() + 60
    while True:
        try:
            with locked_folder(run, "--output_dir"):
                return
        except BlockingIOError:
            assert time.monotonic() < end
            time.sleep(0.02)

"""Trainings that fail: numbers that are not finite, data that teach nothing, checkpoints damaged or of another run."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import record_of, steps_of

from layouts import write_lora, write_native, write_part
from llava.model.builder import load_pretrained_model
from llava.storage.lock import locked_folder
from llava.train import train as llava_training

TUNED = {"tune_mm_mlp_adapter": True}


@pytest.fixture(scope="module")
def on_llava(llava, make_checkpoint: Callable[..., Path]) -> Callable[..., int]:
    """``llava``, the projector only, on a whole LLaVA of its own."""
    return lambda out, **flags: llava(out, **{"model_name_or_path": make_checkpoint(), **TUNED, **flags})


@pytest.fixture(scope="module")
def whole(on_llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at the second and the fourth."""
    out = tmp_path_factory.mktemp("whole")
    assert on_llava(out, save_steps=2) == 0
    return out


def last_line(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("steps", [2, 5])  # at the second it is the first that is not finite, and the last of all
def test_a_loss_that_is_not_finite_ends_the_run(steps: int, on_llava, tmp_path: Path, capsys):
    """When it repeats, or nothing comes after it; step and records are named, and no such weights are saved."""
    flags = {"learning_rate": 1e20, "max_steps": steps, "save_steps": 1, "save_total_limit": 2}
    assert on_llava(tmp_path / "run", **flags) == 2
    message = last_line(capsys)
    assert message.startswith("llava.train.train: the loss of step 2 is not finite (records '")
    assert ("the loss of step 3 is not finite (records '" in message) == (steps > 2)
    assert "Lower learning_rate (1e+20)" in message and message.endswith("run/checkpoint-1")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1"]
    assert all(
        value.isfinite().all() for value in load_file(tmp_path / "run/checkpoint-1/mm_projector.safetensors").values()
    )


def test_one_update_that_is_not_finite_is_left_out(on_llava, tmp_path: Path, monkeypatch, log):
    """The log has it as NaN, the weights are as if it had not been, and the run goes on."""
    step = llava_training.LlavaTrainer.compute_loss
    moved = []

    def compute(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(
            {key: value.detach().clone() for key, value in trainer.model.named_parameters() if value.requires_grad}
        )
        return step(trainer, *args, **kwargs) * (math.nan if len(moved) == 2 else 1)

    monkeypatch.setattr(llava_training.LlavaTrainer, "compute_loss", compute)
    assert on_llava(tmp_path, save_strategy="no", weight_decay=0.1) == 0
    losses = [loss for _, loss, _, _ in steps_of(tmp_path)]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]
    assert losses[2] > 0
    same = [
        all(torch.equal(after[key], value) for key, value in before.items())
        for before, after in itertools.pairwise(moved)
    ]
    assert same == [False, True, False]
    assert "the loss of step 2 is not finite (records 's" in log.text and "its update is left out" in log.text


def test_a_gradient_that_is_not_finite(on_llava, tmp_path: Path, monkeypatch, capsys):
    """With a loss that is: the same."""
    step = llava_training.LlavaTrainer.compute_loss

    def compute(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(trainer, *args, **kwargs)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(llava_training.LlavaTrainer, "compute_loss", compute)
    assert on_llava(tmp_path, save_strategy="no") == 2
    message = last_line(capsys)
    assert "the gradient of step 1 is not finite (records '" in message and "the gradient of step 2" in message
    assert message.endswith("There is no checkpoint yet")
    assert not list(tmp_path.iterdir())


def test_a_projector_that_is_not_finite_is_refused(on_llava, whole: Path, tmp_path: Path, unread, capsys):
    weights = load_file(whole / "mm_projector.safetensors")
    weights["model.mm_projector.0.bias"][3] = math.nan
    save_file(weights, tmp_path / "nan.safetensors")
    assert on_llava(tmp_path / "run", pretrain_mm_mlp_adapter=tmp_path / "nan.safetensors") == 2
    assert "nan.safetensors are NaN or infinite, such as model.mm_projector.0.bias" in last_line(capsys)
    assert not (tmp_path / "run").exists()


def test_answers_that_are_cut_whole(on_llava, world: Path, tmp_path: Path, capsys, log):
    """Known before the run: all of them are refused, some are counted, also at the end."""
    assert on_llava(tmp_path / "none", model_max_length=5) == 2
    message = last_line(capsys)
    assert (
        "of 10 records looked at, 100% lose their whole answer to model_max_length=5 (an image has 16 tokens" in message
    )
    flags = {"max_steps": 5, "save_strategy": "no", "per_device_train_batch_size": 1}
    assert on_llava(tmp_path / "run", **flags, model_max_length=60, train_sampling_strategy="sequential") == 0
    assert "80% lose their whole answer to model_max_length=60" in log.text  # all with an image
    assert "5 of 5 samples (100.0 %) lost their whole answer to model_max_length=60" in log.text
    assert [entry["cut_answers"] for entry in record_of(tmp_path / "run")["losses"][:5]] == [1, 2, 3, 4, 5]
    assert [loss for _, loss, _, _ in steps_of(tmp_path / "run")] == [0] * 5  # nothing to learn is no NaN


def test_text_only_data(on_llava, world: Path, tmp_path: Path, capsys, log, unread):
    """Cannot teach a projector alone; where more is learnt, it is said that the projector is not."""
    records = [record for record in json.loads((world / "data.json").read_text()) if "image" not in record]
    (tmp_path / "text.json").write_text(json.dumps(records))
    flags = {"data_path": tmp_path / "text.json", "save_strategy": "no"}
    assert on_llava(tmp_path / "run", **flags) == 2
    message = last_line(capsys)
    assert "not one of the 2 records of " in message and "the projector would get no gradient" in message
    with pytest.raises(AssertionError, match="too late"):  # it goes on to the model
        on_llava(tmp_path / "run", **flags, tune_mm_mlp_adapter=False, visionzip_dominant=3)
    assert "so that the projector gets no gradient and stays as it is" in log.text


def test_data_come_before_the_model(on_llava, tmp_path: Path, capsys):
    """Which may be on the hub."""
    assert on_llava(tmp_path / "run", model_name_or_path="nobody/nothing", data_path=tmp_path / "none.json") == 2
    assert "no training data at" in last_line(capsys)
    assert not (tmp_path / "run").exists()


def test_one_training_in_a_folder(on_llava, tmp_path: Path, capsys):
    with locked_folder(tmp_path / "run", "output_dir"):
        assert on_llava(tmp_path / "run") == 2
    assert "another process is writing to" in last_line(capsys)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no state": ("trainer_state.json is missing", lambda folder: (folder / "trainer_state.json").unlink()),
    "empty state": ("trainer_state.json (0 bytes) is damaged", lambda folder: cut(folder / "trainer_state.json", 0)),
    "cut optimizer": ("optimizer.pt (1000 bytes) is damaged", lambda folder: cut(folder / "optimizer.pt", 1000)),
    "no optimizer": ("the optimizer's state is missing", lambda folder: (folder / "optimizer.pt").unlink()),
    "cut weights": (
        "mm_projector.safetensors (999 bytes)",
        lambda folder: cut(folder / "mm_projector.safetensors", 999),
    ),
    "cut random state": ("rng_state.pth (20 bytes)", lambda folder: cut(folder / "rng_state.pth", 20)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(name: str, on_llava, whole: Path, tmp_path: Path, log):
    """The run goes on at the one before, and ends as it would have."""
    problem, damage = DAMAGE[name]
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run/checkpoint-4")
    (tmp_path / "run/mm_projector.safetensors").unlink()
    written = (tmp_path / "run/checkpoint-2/mm_projector.bin").stat().st_mtime_ns
    assert on_llava(tmp_path / "run", save_steps=2) == 0
    assert "checkpoint-4 is not whole and is passed over: " in log.text and problem in log.text
    assert (tmp_path / "run/checkpoint-2/mm_projector.bin").stat().st_mtime_ns == written
    for file in ("mm_projector.safetensors", "checkpoint-4/mm_projector.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()


def test_a_run_of_other_contents_does_not_go_on(on_llava, whole: Path, world: Path, copied, tmp_path: Path, capsys):
    """Other data or weights under the same name, another batch or schedule: each difference is named."""
    shutil.copytree(whole, tmp_path / "run")
    records = json.loads((world / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([*records[:9], {**records[9], "id": "other"}]))
    model = copied()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    renamed = model.rename(model.with_name("llava-v1.5-tiny"))
    flags = {
        "data_path": tmp_path / "data.json",
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "model_name_or_path": renamed,
    }
    assert on_llava(tmp_path / "run", save_steps=2, **flags) == 2
    message = last_line(capsys)
    for named in (
        "records='10, sha256 ",
        "global_batch=4 (there: 2)",
        "lr_scheduler_type='cosine' (there: 'linear')",
        "model_name_or_path content='",
    ):
        assert named in message
    assert message.count("(there: ") == 4
    assert (tmp_path / "run/run.json").read_bytes() == (whole / "run.json").read_bytes()


def spoil(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first weight of a projector or an adapter has an infinite number in it."""
    key = next(key for key in sorted(weights) if "projector" in key or "lora_" in key)
    return {**weights, key: torch.where(torch.arange(weights[key].shape[-1]) == 1, math.inf, weights[key])}


@pytest.mark.parametrize("layout", ["whole", "projector", "adapter", "transformers"])
def test_a_model_whose_training_has_failed_is_refused(layout: str, make_checkpoint, copied, tmp_path: Path):
    """In all layouts that a training leaves, before anyone believes its answers."""
    folder, base, file = tmp_path / layout, str(make_checkpoint()), "model.safetensors"
    if layout == "whole":
        folder, base = copied(), None
    elif layout == "transformers":
        write_native(folder)
        base = None
    elif layout == "adapter":
        write_lora(make_checkpoint(), folder, ".safetensors")
        file = "adapter_model.safetensors"
    else:
        projector, file = write_part(make_checkpoint(), folder), "mm_projector.safetensors"
        save_file(projector, folder / file)
    save_file(spoil(load_file(folder / file)), folder / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights from .* are NaN or infinite, such as .*(projector|lora_)"):
        load_pretrained_model(str(folder), base, device="cpu")

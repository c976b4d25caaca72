"""Training that starts from a LLaVA: an adapter, tiles, what is cut or skipped, and a disk that is full."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training import record_of, steps_of

from checkpoints import LANGUAGE_MODEL, NEXT, TOWER_PREFIX
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.builder import load_pretrained_model
from visionzip import VisionZipConfig


@pytest.fixture(scope="module")
def on_llava(llava, world: Path, make_checkpoint: Callable[..., Path]) -> Callable[..., int]:
    """``llava``, on a whole LLaVA of its own."""
    return lambda out, **flags: llava(out, model_name_or_path=make_checkpoint(), **flags)


LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-3}


def test_an_adapter_and_the_projector(on_llava, make_checkpoint, tmp_path: Path):
    """LoRA: what is learnt is in LLaVA's files, loads over the base, and goes on when it is stopped."""
    flags = {**LORA, "save_steps": 2, "visionzip_dominant": 3, "visionzip_contextual": 2}
    assert on_llava(tmp_path / "whole", **flags) == 0
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "stopped/checkpoint-2")
    assert on_llava(tmp_path / "stopped", **flags) == 0
    assert steps_of(tmp_path / "stopped") == steps_of(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.rglob("model.safetensors"))

    beside = torch.load(tmp_path / "whole/non_lora_trainables.bin")
    assert all(key.startswith("base_model.model.model.mm_projector.") for key in beside)
    before = load_file(make_checkpoint() / "model.safetensors")
    model = load_pretrained_model(str(tmp_path / "whole"), str(make_checkpoint()), device="cpu")[1]
    assert model.get_vision_tower().visionzip == VisionZipConfig(dominant=3, contextual=2)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {
        key
        for key in before
        if not key.startswith(TOWER_PREFIX) and ("mm_projector" in key or "self_attn" in key or "mlp" in key)
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_quantised_model(bits: int, on_llava, make_checkpoint, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    assert on_llava(tmp_path, **LORA, bits=bits, max_steps=2, bf16=True, save_strategy="no") == 0
    load_pretrained_model(str(tmp_path), str(make_checkpoint()), device="cpu")


def test_gradients_reach_the_projector_through_checkpoints(on_llava, tmp_path: Path):
    """Less memory, the same steps."""
    flags = {"tune_mm_mlp_adapter": True, "max_steps": 2, "save_strategy": "no"}
    for checkpointing in (False, True):
        assert on_llava(tmp_path / str(checkpointing), **flags, activation_checkpointing=checkpointing) == 0
    found, expected = (steps_of(tmp_path / str(checkpointing)) for checkpointing in (True, False))
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in zip(found, expected, strict=True))
    assert expected[1][3] > 0


def test_tiles_of_llava_next(world: Path, llava, make_checkpoint, tmp_path: Path):
    """Trained as they are asked for, with a text-only sample in the batch."""
    tiles = make_checkpoint(**NEXT)
    flags = {"tune_mm_mlp_adapter": True, "visionzip_dominant": 3, "visionzip_contextual": 2, "save_strategy": "no"}
    batch = {"max_steps": 1, "per_device_train_batch_size": 10}
    assert llava(tmp_path / "all", model_name_or_path=tiles, **flags, **batch) == 0
    logged = record_of(tmp_path / "all")["losses"][0]
    grid = get_anyres_image_grid_shape((90, 60), LANGUAGE_MODEL["image_grid_pinpoints"], 56)
    assert logged["visual_tokens_per_image"] == 5 * (1 + grid[0] * grid[1])
    padded = {**batch, "image_aspect_ratio": "pad"}
    assert llava(tmp_path / "padded", model_name_or_path=tiles, **flags, **padded) == 0
    assert record_of(tmp_path / "padded")["losses"][0]["visual_tokens_per_image"] == 5 + 1  # and the newline
    config = json.loads((tmp_path / "padded/config.json").read_text())
    assert config["image_aspect_ratio"] == "pad"


def test_what_is_too_long_is_cut_and_counted(on_llava, tmp_path: Path):
    """At the whole prompt's length, visual tokens included; also with what the record shows as the longest."""
    flags = {"tune_mm_mlp_adapter": True, "max_steps": 2, "per_device_train_batch_size": 10, "save_strategy": "no"}
    assert on_llava(tmp_path, **flags, model_max_length=80) == 0
    assert [entry["cut_samples"] for entry in record_of(tmp_path)["losses"][:2]] == [8, 16]  # text only is shorter
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer_model_max_length"] == 80


def test_what_is_cut_by_its_positions_is_counted(on_llava, tmp_path: Path):
    """With original positions an image takes the place of all its patches, and is cut there, whatever is kept of it."""
    flags = {"tune_mm_mlp_adapter": True, "max_steps": 1, "per_device_train_batch_size": 10, "save_strategy": "no"}
    few = {"visionzip_method": "visionzip-plus", "visionzip_dominant": 3, "visionzip_contextual": 0}
    assert on_llava(tmp_path, **flags, **few, model_max_length=80) == 0
    assert record_of(tmp_path)["losses"][0]["cut_samples"] == 8


def test_records_that_are_skipped_are_counted(world: Path, on_llava, tmp_path: Path):
    records = json.loads((world / "data.json").read_text())[:4]
    (world / "images/torn.png").write_bytes((world / "images/1.png").read_bytes()[:3000])
    records += [{**records[0], "id": ["torn"], "image": "torn.png"}, {**records[0], "id": "lost", "image": "lost.png"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = {"data_path": tmp_path / "data.json", "tune_mm_mlp_adapter": True, "num_train_epochs": 2, "max_steps": -1}
    assert on_llava(tmp_path / "run", **flags, skip_bad_samples=True, group_by_modality_length=True) == 0
    record = record_of(tmp_path / "run")
    assert record["records"] == 5
    assert [bad["id"] for bad in record["left_out"]] == ["lost", ["torn"]]
    assert len(steps_of(tmp_path / "run")) == 6  # two epochs of five records, two at a time


def test_wandb_without_a_network(on_llava, tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    assert on_llava(tmp_path / "run", tune_mm_mlp_adapter=True, max_steps=1, report_to="wandb", save_strategy="no") == 0
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_full_disk(on_llava, full_disk, tmp_path: Path, monkeypatch, capsys):
    """Is seen before training; where it fills up later, what is there stays whole and the run can go on."""
    flags = {"tune_mm_mlp_adapter": True, "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        assert on_llava(tmp_path / "run", **flags) == 2
    assert "GiB free, but this run's checkpoints and results will take about" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

    assert on_llava(tmp_path / "run", **flags) == 0
    result = (tmp_path / "run/mm_projector.bin").read_bytes()
    for lost, message in (("checkpoint-4", "cannot write the checkpoint of step 4"), ("", "cannot write ")):
        if lost:
            shutil.rmtree(tmp_path / "run" / lost)
        with full_disk(5_000):
            assert on_llava(tmp_path / "run", **flags) == 2
        assert message in (last := capsys.readouterr().err.splitlines()[-1])
        assert f"{tmp_path}/run" in last and "ake room" in last
        assert (tmp_path / "run/mm_projector.bin").read_bytes() == result
        assert not list(tmp_path.rglob("*.partial"))
        assert on_llava(tmp_path / "run", **flags) == 0
        assert (tmp_path / "run/mm_projector.bin").read_bytes() == result


def test_room_that_a_stopped_run_has_taken(on_llava, tmp_path: Path, monkeypatch):
    """A disk that the whole run just fits on is large enough to go on, with a checkpoint on it already."""
    projector = 2 * (32 * 32 + 32)
    capacity = 8 * projector + 2 * (8 + 12) * projector  # the result in two files, two checkpoints with AdamW's state

    def usage(path: Path) -> SimpleNamespace:
        taken = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
        return SimpleNamespace(free=capacity - taken)

    flags = {"tune_mm_mlp_adapter": True, "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", usage)
        assert on_llava(tmp_path / "whole", **flags) == 0
        shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "run/checkpoint-2")
        assert on_llava(tmp_path / "run", **flags) == 0

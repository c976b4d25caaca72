"""Trained models and their data that several files ask for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from training import TRAINER, command, record_of, turns
from visual_cache import SIZES

from checkpoints import picture

# LLaVA's two stages


@pytest.fixture(scope="session")
def projector(world: Path, llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage's folder."""
    out = tmp_path_factory.mktemp("projector")
    new = {"model_name_or_path": world / "base", "vision_tower": world / "tower"}
    assert llava(out, **new, tune_mm_mlp_adapter=True, version="plain", data_path=captions(world), save_steps=2) == 0
    return out


def captions(world: Path) -> Path:
    path = world / "captions.json"
    records = json.loads((world / "data.json").read_text())[:8]
    path.write_text(json.dumps([{**record, "conversations": record["conversations"][:2]} for record in records]))
    return path


@pytest.fixture(scope="session")
def second_stage(world: Path, projector: Path) -> dict[str, Any]:
    """Its arguments, beside the folder."""
    return {
        "model_name_or_path": world / "base",
        "vision_tower": world / "tower",
        "pretrain_mm_mlp_adapter": projector / "mm_projector.safetensors",
        "mm_projector_lr": 1e-3,
        "save_steps": 2,
    }


@pytest.fixture(scope="session")
def tuned(llava, second_stage: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second stage's folder."""
    out = tmp_path_factory.mktemp("tuned")
    assert llava(out, **second_stage) == 0
    return out


# ``--cache_visual_tokens``


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data.json``: six records with images of several shapes, one of them again, and two of text only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    records = []
    for index, size in enumerate(SIZES):
        picture(index, size).save(folder / "images" / f"{index}.png")
        asked = turns("<image>\nWhat?", f"the {index}")
        records.append({"id": f"seen-{index}", "image": f"{index}.png", "conversations": asked})
    records.append({**records[0], "id": "seen-again"})
    for index in (8, 9):
        asked = turns("What is left?", f"{index}")
        records.append({"id": f"read-{index}", "conversations": asked})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def own_shapes(shapes: Path, tmp_path: Path) -> Path:
    """``shapes`` for a test that changes it."""
    return shutil.copytree(shapes, tmp_path / "data")


@pytest.fixture
def tune(shapes: Path, make_checkpoint, tmp_path: Path) -> Callable[..., Any]:
    """``python -m llava.train.train``, projector only, for four steps; what it leaves, or its exit status if not 0."""

    from llava.train import train as llava_training  # noqa: PLC0415 - takes seconds, which other tests do not need

    def run(name: str, folder: Path = shapes, model: Path | None = None, **flags: Any) -> Any:
        own = {
            **TRAINER,
            "tune_mm_mlp_adapter": True,
            "max_steps": 4,
            "save_strategy": "no",
            "model_name_or_path": model or make_checkpoint(),
            "output_dir": tmp_path / name,
            "data_path": folder / "data.json",
            "image_folder": folder / "images",
        }
        status = command(llava_training.main, **{**own, **flags})
        if status:
            return status
        record = record_of(tmp_path / name)
        logged = [entry for entry in record["losses"] if "loss" in entry]
        weights = {}
        for file in (tmp_path / name).glob("*.safetensors"):
            weights |= load_file(file)
        return SimpleNamespace(
            losses=[entry["loss"] for entry in logged],
            tokens=[entry.get("visual_tokens_per_image") for entry in logged],
            weights=weights,
            record=record,
        )

    return run

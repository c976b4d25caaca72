"""Fixtures of training: what it starts from, the command, and its data. ``tests/conftest.py`` loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import TRAINER, command, turns
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from checkpoints import CLIP, LANGUAGE_MODEL, picture, scale_up, write_tokenizer, write_tower
from llava.train.data import InstructionData, read_records


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training starts from: a language model in ``base``, a vision tower in ``tower``, ``images``, ``data.json``.

    Records 0 to 7 have an image, 8 and 9 are text only.
    """
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    own = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith(("mm_", "image_"))}
    LlamaForCausalLM(LlamaConfig(**own)).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    encoder = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    scale_up(encoder)
    weights = {f"vision_model.{key}": value for key, value in encoder.state_dict().items()}
    write_tower(folder / "tower", CLIP, weights)
    (folder / "images").mkdir()
    records = []
    for index in range(8):
        picture(index).save(folder / "images" / f"{index}.png")
        said = turns("<image>\nWhat is it?", f"the {index}", "And then?", "nothing")
        records.append({"id": f"seen-{index}", "image": f"{index}.png", "conversations": said})
    records += [{"id": f"read-{index}", "conversations": turns("What is left?", f"{index}")} for index in (8, 9)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def llava(world: Path) -> Callable[..., int]:
    """``python -m llava.train.train`` on the world's data, for four steps unless told otherwise."""
    from llava.train import train as llava_training  # noqa: PLC0415 - takes seconds, which other tests do not need

    def run(out: Path, **flags: Any) -> int:
        own = {"output_dir": out, "data_path": world / "data.json", "image_folder": world / "images", "max_steps": 4}
        return command(llava_training.main, **{**TRAINER, **own, **flags})

    return run


@pytest.fixture
def dataset(world: Path, tokenizers, tmp_path: Path) -> Callable[..., InstructionData]:
    """``InstructionData`` of the world's records or of others."""

    def make(
        records: Any = None,
        data_path: Path = world / "data.json",
        image_folder: Path | None = world / "images",
        processor: Any = True,
        aspect_ratio: str = "pad",
        version: str = "v1",
        skipped: Path | None = None,
        **options: Any,
    ) -> InstructionData:
        if records is not None:
            data_path = tmp_path / "other.json"
            data_path.write_text(json.dumps(records))
        folder = image_folder and str(image_folder)
        options |= {"has_tower": processor is not None, "skip_bad": skipped is not None}
        kept = read_records(str(data_path), folder, version, **options).kept
        if processor is True:
            processor = CLIPImageProcessorPil.from_pretrained(world / "tower")
        config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=[[56, 112], [112, 56]])
        return InstructionData(kept, folder, tokenizers[False], version, processor, config, skipped=skipped)

    return make

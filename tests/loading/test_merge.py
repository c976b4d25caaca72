"""``visionzip merge``: a tuned part and its base become a checkpoint that needs neither."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import TOWER_PREFIX, edit_config, edit_weights, picture
from layouts import FILE, assert_same, load, save_safetensors, weights_of, without, write_lora, write_part
from llava.cli import main
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from visionzip import VisionZipConfig

ZIPPED = {"dominant": 3, "contextual": 2}


def merge(part: Path, base: Path, out: Path, *flags: str) -> int:
    return main(["merge", "--model-path", str(part), "--model-base", str(base), "--output", str(out), *flags])


def answer(*folders: Path) -> tuple[list[int], Any]:
    """What a model says to an image, and the model."""
    tokenizer, model, processor, _ = load_pretrained_model(*map(str, folders), device="cpu")
    ids = tokenizer_image_token("<image>\nWhat is there?", tokenizer, return_tensors="pt")[None]
    images = process_images([picture(0)], processor, model.config)
    return model.generate(ids, images=images, max_new_tokens=6, do_sample=False)[0].tolist(), model


@pytest.fixture
def projector(tmp_path: Path) -> Callable[[Path], Path]:
    """A tuned projector of a checkpoint, zipped."""

    def make(base: Path) -> Path:
        weights = write_part(base, tmp_path / "projector")
        save_safetensors(weights, tmp_path / "projector/mm_projector.safetensors")
        edit_config(tmp_path / "projector", visionzip=ZIPPED, use_cache=False)
        return tmp_path / "projector"

    return make


@pytest.mark.parametrize("tower_inside", [True, False])
def test_a_projector(tower_inside: bool, copied, projector, tmp_path: Path, capsys):
    """The checkpoint answers as the parts do, when these and the tower's own folder are gone."""
    base = copied(tower_inside=tower_inside)
    (base / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')  # as Vicuna's
    part = projector(base)
    expected, parts = answer(part, base)
    assert merge(part, base, tmp_path / "merged") == 0
    assert "LlavaLlamaForCausalLM on cpu, float32 · VisionZip 3 + 2, 0.0 GB" in capsys.readouterr().out
    shutil.rmtree(base)
    shutil.rmtree(part)
    shutil.rmtree(tmp_path / "tower")
    ids, model = answer(tmp_path / "merged")
    assert ids == expected
    assert model.get_vision_tower().visionzip == VisionZipConfig(**ZIPPED)
    assert model.config.use_cache
    assert model.generation_config.temperature == 0.9
    assert_same(dict(model.state_dict()), dict(parts.state_dict()))


def test_a_lora(make_checkpoint, tmp_path: Path):
    merged = write_lora(make_checkpoint(), tmp_path / "lora")
    assert merge(tmp_path / "lora", make_checkpoint(), tmp_path / "out/merged") == 0
    weights = weights_of(tmp_path / "out/merged")
    assert weights.keys() == merged.keys()
    for key, value in merged.items():
        torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=1e-4)
    assert load(tmp_path / "out/merged").get_vision_tower().visionzip is None


@pytest.mark.parametrize(("flags", "dtype"), [([], torch.bfloat16), (["--dtype", "float32"], torch.float32)])
def test_the_type_is_the_bases(flags: list[str], dtype: torch.dtype, copied, projector, tmp_path: Path):
    """Not the one that was trained in."""
    base = copied()
    part = projector(base)
    edit_config(part, dtype="float32")
    edit_weights(base, lambda weights: {key: value.bfloat16() for key, value in weights.items()})
    assert merge(part, base, tmp_path / "merged", *flags) == 0
    assert {value.dtype for value in weights_of(tmp_path / "merged").values()} == {dtype}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_what_cannot_be_merged(copied, projector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, unread):
    """One line, before a weight is read; nothing is left."""
    base = copied()
    part = projector(base)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").write_text("")
    out = tmp_path / "out"
    for arguments, message in (
        ((base, base, out), f"{base} is a full checkpoint already: there is nothing to merge"),
        ((part, base, full), f"--output {full} exists: choose a new folder"),
        ((part, base, full / "notes"), "exists: choose a new folder"),
        ((full, base, out), "has no config.json"),
        ((part, Path("/nowhere"), out), "/nowhere"),
        ((part, base, full / "notes/out"), "is a file, not a folder"),
    ):
        assert merge(*arguments) == 2
        assert message in capsys.readouterr().err
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=9))
    assert merge(part, base, out) == 2
    assert f"--output {out} needs 0.0 GB but {tmp_path} has 0.0 GB free" in capsys.readouterr().err
    monkeypatch.undo()
    edit_weights(base, without("model.norm.weight"))
    assert merge(part, base, out) == 2
    assert "1 missing from the checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_merge_that_was_stopped_is_done_anew(copied, projector, tmp_path: Path):
    base = copied()
    part = projector(base)
    (tmp_path / "merged").mkdir()  # empty, as mktemp makes it
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / FILE).write_text("half of it")
    assert merge(part, base, tmp_path / "merged") == 0
    assert any(key.startswith(TOWER_PREFIX) for key in weights_of(tmp_path / "merged"))
    assert not list(tmp_path.glob("*.partial"))

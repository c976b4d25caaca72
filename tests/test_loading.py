"""Every layout that LLaVA checkpoints come in, on tiny ones, and what is said when one is not right."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from checkpoints import (
    CLIP,
    LANGUAGE_MODEL,
    SIGLIP,
    TOWER_PREFIX,
    edit_config,
    edit_weights,
    write_checkpoint,
    write_hub_tower,
    write_qwen_tokenizer,
    write_tokenizer,
)
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaQwenForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import no_load_report
from visionzip import visionzip

WEIGHTS = "model.safetensors"
PROMPT = torch.tensor([[1, 5, 6, -200, 7, 8]])


def load(folder: Path, base: Path | None = None, **options: Any) -> Any:
    return load_pretrained_model(str(folder), base and str(base), device="cpu", **options)[1]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(actual[key], value)]


def logits(model: Any) -> Tensor:
    edge = model.get_vision_tower().config.image_size
    pixels = torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(PROMPT, images=pixels.to(model.dtype)).logits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint with these options, written once; not to be changed."""
    folders: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = str(sorted(options.items()))
        if key not in folders:
            folders[key] = write_checkpoint(tmp_path_factory.mktemp("written") / "llava", **options)
        return folders[key]

    return make


@pytest.fixture
def copied(written: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a checkpoint, and of its tower, for the test alone."""

    def make(**options: Any) -> Path:
        source = written(**options)
        folder = shutil.copytree(source, tmp_path / "llava")
        shutil.copytree(source.with_name("llava-tower"), tmp_path / "tower")
        edit_config(folder, mm_vision_tower=str(tmp_path / "tower"))
        return folder

    return make


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    """What users would read, transformers' warnings too."""
    transformers.logging.enable_propagation()
    yield caplog
    transformers.logging.disable_propagation()


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a LLaVA's weights are read: what is known before has to be said before."""
    read = PreTrainedModel._load_pretrained_model

    def checked(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(model, LlavaMetaForCausalLM), "the weights were read first"
        return read(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(checked))


# Full checkpoints


def shard(folder: Path, save: Callable[[dict[str, Tensor], Path], None], stem: str, suffix: str) -> None:
    weights = weights_of(folder)
    (folder / WEIGHTS).unlink()
    weight_map = {key: f"{stem}-0000{1 + number % 2}-of-00002{suffix}" for number, key in enumerate(weights)}
    for name in set(weight_map.values()):
        save({key: value for key, value in weights.items() if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def save_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights, path, metadata={"format": "pt"})


def to_bin(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


LAYOUTS = {
    "one": lambda folder: None,
    "shards": lambda folder: shard(folder, save_safetensors, "model", ".safetensors"),
    "bin": to_bin,
    "bin_shards": lambda folder: shard(folder, torch.save, "pytorch_model", ".bin"),
}


@pytest.mark.parametrize("tower_inside", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_checkpoint(layout: str, tower_inside: bool, written, copied, log):
    expected = weights_of(written())
    folder = copied(tower_inside=tower_inside)
    LAYOUTS[layout](folder)
    assert_same(load(folder).state_dict(), expected)
    assert not log.records


def test_relative_tower(written, copied):
    folder = copied(tower_inside=False)
    shutil.move(folder.with_name("tower"), folder / "encoder")
    edit_config(folder, mm_vision_tower="encoder")
    assert_same(load(folder).state_dict(), weights_of(written()))


@pytest.mark.parametrize("vision", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_tower_as_on_the_hub(vision: dict[str, Any], tmp_path: Path, log):
    """``openai/clip-vit-large-patch14-336`` is a whole CLIP: two configs in one, and the text encoder's weights."""
    folder = write_checkpoint(tmp_path / "llava", vision=vision, tower_inside=False)
    write_hub_tower(tmp_path / "llava-tower", vision)
    model = load(folder)
    expected = load_file(tmp_path / "llava-tower" / WEIGHTS)
    own = model.get_vision_tower().vision_tower.state_dict()
    assert_same(own, {key: value for key, value in expected.items() if key in own})
    assert not log.records


def test_siglip_without_its_last_layer(tmp_path: Path):
    """LLaVA-OneVision's checkpoints lack what is never used: the last layer and the pooling head."""
    vision = {**SIGLIP, "vision_use_head": True}
    folder = write_checkpoint(tmp_path / "llava", vision=vision)
    unused = tuple(f"{TOWER_PREFIX}vision_model.{name}" for name in ("encoder.layers.3.", "head.", "post_layernorm."))
    edit_weights(folder, lambda weights: {key: value for key, value in weights.items() if not key.startswith(unused)})
    shutil.rmtree(tmp_path / "llava-tower" / WEIGHTS, ignore_errors=True)
    model = load(folder)
    with pytest.raises(ValueError, match="layer=-1 has no weights"):
        visionzip(model, VisionZipConfig := None)
    model.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "saved"), weights_of(folder))

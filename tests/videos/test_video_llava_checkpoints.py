"""Video-LLaVA: checkpoints of the original layout, whole and not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_videos import EDGE, image, load, video

from checkpoints import CLIP, edit_config, edit_weights, write_tokenizer
from llava.conversation import conv_mode_for
from llava.model.builder import load_pretrained_model
from visionzip import visionzip


def test_original_checkpoint(folder: Path):
    """As released: the names of LLaVA-1.5's class, told apart by ``mm_video_tower``; the towers' weights inside."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["model_type"] == "llava"
    _, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    assert type(model).__name__ == "VideoLlavaLlamaForCausalLM"
    assert model.get_image_tower().is_loaded and not model.get_image_tower().untrained
    assert model.get_video_tower().is_loaded and not model.get_video_tower().untrained
    assert model.get_video_tower().config.num_frames == 8
    assert processor is model.get_image_tower().image_processor
    assert conv_mode_for("Video-LLaVA-7B") == "llava_v1"
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    names = {key for key in weights if "video_tower" in key and ".layers.2." in key and "temporal" in key}
    assert {key.partition(".layers.2.")[2] for key in names} == {
        "temporal_embedding",
        *(f"temporal_layer_norm1.{end}" for end in ("weight", "bias")),
        *(f"temporal_attn.{name}_proj.{end}" for name in ("q", "k", "v", "out") for end in ("weight", "bias")),
    }


def test_old_buffers_are_passed_over(folder: Path, tmp_path: Path):
    """The released files have what older versions of transformers saved besides."""
    old = shutil.copytree(folder, tmp_path / "old")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    for kind in ("image", "video"):
        buffers[f"model.{kind}_tower.{kind}_tower.embeddings.position_ids"] = torch.arange(65)[None]
    edit_weights(old, lambda weights: weights | buffers)
    seen, expected = (torch.stack(load(place).visual_tokens([video()])) for place in (old, folder))
    assert torch.equal(seen, expected)


def test_towers_from_their_own_folders(make_video_checkpoint: Callable[..., Path], folder: Path):
    """Where the checkpoint has none of their weights, as in LanguageBind's ``pytorch_model.bin``."""
    without = make_video_checkpoint(vision={**CLIP, "image_size": EDGE}, towers_inside=False)
    model = load(without)
    for kind in ("image", "video"):
        weights = torch.load(without.with_name(f"{without.name}-{kind}") / "pytorch_model.bin")
        encoder = model.towers()[f"model.{kind}_tower.{kind}_tower."].encoder.state_dict()
        assert all(torch.equal(value, weights[f"vision_model.{key}"]) for key, value in encoder.items())


def test_saved_and_loaded_again(model: Any, folder: Path, tmp_path: Path):
    """Without the towers' folders, and zipped as it was."""
    expected = torch.cat(visionzip(model, merge="average").visual_tokens([image(), video()]))
    model.config.mm_image_tower = model.config.mm_video_tower = "nowhere/to-be-found"
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    again = load(tmp_path)
    assert again.config.visionzip == {"dominant": 15, "contextual": 2, "layer": -2, "merge": "average"}
    assert torch.equal(torch.cat(again.visual_tokens([image(), video()])), expected)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.video_tower.video_tower.encoder.layers.1.temporal_embedding", "1 missing from the checkpoint"),
        ("model.image_tower.image_tower.encoder.layers.1.mlp.fc1.bias", "1 missing from the checkpoint"),
    ],
)
def test_an_incomplete_tower(folder: Path, tmp_path: Path, key: str, message: str):
    broken = shutil.copytree(folder, tmp_path / "broken")
    edit_weights(broken, lambda weights: {name: value for name, value in weights.items() if name != key})
    with pytest.raises(ValueError, match=f"{message}, such as {key}"):
        load(broken)


def test_a_video_tower_alone_is_refused(folder: Path, tmp_path: Path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    edit_config(broken, mm_image_tower=None)
    with pytest.raises(ValueError, match="comes without an mm_image_tower"):
        load(broken)
    edit_config(broken, mm_image_tower="nowhere/to-be-found")
    with pytest.raises(OSError, match="mm_image_tower='nowhere/to-be-found'"):
        load(broken)

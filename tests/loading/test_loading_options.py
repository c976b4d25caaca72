"""How a LLaVA checkpoint is loaded (precision, attention kernel, devices, quantisation), and saved."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from checkpoints import (
    CLIP,
    SIGLIP,
    edit_config,
)
from layouts import (
    assert_same,
    device_map_for,
    generate,
    load,
    weights_of,
)
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from visionzip import VisionZipConfig, unzip, visionzip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
def test_dtype(option: str, dtype: torch.dtype, make_checkpoint):
    """It holds for the tower too, also where its weights come from another folder."""
    for tower_inside in (True, False):
        model = load(make_checkpoint(tower_inside=tower_inside), **{option: dtype})
        assert {value.dtype for value in model.parameters()} == {dtype}


def test_dtype_of_the_file(make_checkpoint):
    model = LlavaLlamaForCausalLM.from_pretrained(make_checkpoint(), dtype="auto")
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(attention: str, make_checkpoint):
    model = load(make_checkpoint(), attn_implementation=attention)
    assert model.config._attn_implementation == model.get_vision_tower().config._attn_implementation == attention


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device": torch.device("cpu")}, {"device_map": {"": "cpu"}}]
)
def test_devices(options: dict[str, Any], make_checkpoint):
    model = load_pretrained_model(str(make_checkpoint()), **options)[1]
    automatic = torch.cuda.is_available() and options == {"device_map": "auto"}
    assert {value.device.type for value in model.parameters()} == {"cuda" if automatic else "cpu"}


@pytest.mark.parametrize("room", [0.2, 0.5, 0.7, 0.9])
def test_what_does_not_fit_is_the_end_of_the_language_model(room: float, make_checkpoint):
    config = AutoConfig.from_pretrained(make_checkpoint(), num_hidden_layers=30)
    device_map, offloaded = device_map_for(LlavaLlamaForCausalLM, config, room)
    assert "model.vision_tower" in device_map  # in one piece
    assert offloaded and (room < 0.5 or offloaded <= {"layers", "norm", "rotary_emb"})


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation(bits: int, tmp_path: Path, copied):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = copied(hidden_size=64, mm_hidden_size=32)
    model = load(folder, **{f"load_{bits}bit": True})
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, module in linears.items() if isinstance(module, kind)} == {
        name for name in linears if name.startswith("model.layers.")
    }
    answer = generate(model)
    assert answer.shape == (1, 4)
    assert generate(visionzip(model, dominant=4, contextual=2)).shape == (1, 4)
    assert torch.equal(generate(unzip(model)), answer)


def test_quantisation_needs_bitsandbytes(make_checkpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        load(make_checkpoint(), load_4bit=True)


@pytest.mark.parametrize("tower_inside", [True, False])
@pytest.mark.parametrize("vision", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_saved_folder_stands_alone(vision: dict[str, Any], tower_inside: bool, make_checkpoint, copied, tmp_path: Path):
    folder = copied(vision=vision, tower_inside=tower_inside)
    edit_config(folder.parent / "tower", hidden_act="relu")  # not a default, so that it has to be stored
    processor = json.loads((folder.parent / "tower" / "preprocessor_config.json").read_text())
    (folder.parent / "tower" / "preprocessor_config.json").write_text(
        json.dumps({**processor, "image_mean": [0.1, 0.2, 0.3]})
    )
    tokenizer, model, image_processor, _ = load_pretrained_model(str(folder), device="cpu")
    assert image_processor is model.get_vision_tower().image_processor
    visionzip(model, dominant=4, contextual=2)
    answer = generate(model)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "saved"), weights_of(make_checkpoint(vision=vision)))

    shutil.rmtree(tmp_path / "tower")
    _, again, processor_again, _ = load_pretrained_model(str(tmp_path / "saved"), device="cpu")
    assert again.get_vision_tower().visionzip == VisionZipConfig(4, 2)
    assert torch.equal(generate(again), answer)
    assert processor_again.to_dict() == image_processor.to_dict()
    assert list(processor_again.image_mean) == [0.1, 0.2, 0.3]


def test_saving_without_an_image_processor(copied, tmp_path: Path, offline, log):
    """The tower is known by its hub name only, and there is no connection; its weights are in the checkpoint."""
    folder = copied()
    edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_config=CLIP)
    model = LlavaLlamaForCausalLM.from_pretrained(folder)
    assert not log.messages
    model.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "saved"), weights_of(folder))
    assert "saved without the image processor" in log.messages[-1]

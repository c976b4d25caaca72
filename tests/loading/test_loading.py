"""Every layout that LLaVA checkpoints come in, on tiny ones (for faulty ones see test_loading_errors.py)."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from checkpoints import (
    CLIP,
    LANGUAGE_MODEL,
    SIGLIP,
    TOWER_PREFIX,
    edit_config,
    edit_weights,
    write_checkpoint,
    write_hub_tower,
    write_tokenizer,
)
from layouts import (
    FILE,
    LAYOUTS,
    assert_same,
    generate,
    load,
    save_safetensors,
    weights_of,
    without,
    write_lora,
    write_part,
)
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints.loading import no_load_report
from visionzip import visionzip

ENCODER = TOWER_PREFIX + "vision_model."


# Full checkpoints


@pytest.mark.parametrize("tower_inside", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_checkpoint(layout: str, tower_inside: bool, make_checkpoint, copied, log):
    folder = copied(tower_inside=tower_inside)
    LAYOUTS[layout](folder)
    assert_same(load(folder).state_dict(), weights_of(make_checkpoint()))
    assert not log.messages


def test_tower_inside_the_checkpoints_folder(make_checkpoint, copied):
    folder = copied(tower_inside=False)
    (folder.parent / "tower").rename(folder / "encoder")
    edit_config(folder, mm_vision_tower="encoder")
    assert_same(load(folder).state_dict(), weights_of(make_checkpoint()))


@pytest.mark.parametrize("vision", [CLIP, {**SIGLIP, "vision_use_head": True}], ids=["clip", "siglip"])
def test_tower_as_on_the_hub(vision: dict[str, Any], tmp_path: Path, log):
    """``openai/clip-vit-large-patch14-336`` is the whole CLIP: two configs in one, and the text encoder's weights."""
    folder = write_checkpoint(tmp_path / "llava", vision=vision, tower_inside=False)
    write_hub_tower(tmp_path / "llava-tower", vision)
    expected = weights_of(tmp_path / "llava-tower")
    log.clear()
    own = load(folder).get_vision_tower().vision_tower.state_dict()
    assert_same(own, {key: expected[key] for key in own})
    assert not log.messages


def test_siglip_without_what_is_never_used(tmp_path: Path, log):
    """LLaVA-OneVision's checkpoints lack the encoder's last layer and its pooling head."""
    folder = write_checkpoint(tmp_path / "llava", vision={**SIGLIP, "vision_use_head": True})
    unused = tuple(ENCODER + name for name in ("encoder.layers.3.", "post_layernorm.", "head."))
    edit_weights(folder, lambda weights: {key: value for key, value in weights.items() if not key.startswith(unused)})
    model = load(folder)
    assert not log.messages
    assert generate(visionzip(model, dominant=4, contextual=2)).shape == (1, 4)
    with pytest.raises(ValueError, match="layer=-1 has no weights in this checkpoint"):
        visionzip(model, dominant=4, contextual=2, layer=-1)
    model.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "saved"), weights_of(folder))
    edit_config(folder, visionzip={"dominant": 4, "contextual": 2, "layer": -1})
    with pytest.raises(ValueError, match=r"16 missing from the checkpoint, such as .*encoder\.layers\.3\."):
        load(folder)


def test_newline_that_the_merge_type_does_not_use(copied, tmp_path: Path):
    """LLaVA-NeXT's weights with a config that lays tiles out flat: kept, saved, and there when the type changes."""
    folder = copied()
    newline = {"model.image_newline": torch.randn(32)}
    edit_weights(folder, lambda weights: weights | newline)
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), weights_of(folder))
    model.config.mm_patch_merge_type = "spatial_unpad"
    assert torch.equal(model.visual_tokens([torch.zeros(3, 56, 56)])[0][-1], newline["model.image_newline"])


def test_obsolete_buffers(copied, make_checkpoint):
    folder = copied()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        ENCODER + "embeddings.position_ids": torch.arange(17)[None],
    }
    edit_weights(folder, lambda weights: weights | buffers)
    assert_same(load(folder).state_dict(), weights_of(make_checkpoint()))


def test_hub_names(make_checkpoint, copied, publish, tmp_path: Path, log):
    """A checkpoint, its tower, a projector and an adapter, none of them a folder."""
    source = make_checkpoint()
    projector = write_part(source, tmp_path / "projector")
    torch.save(projector, tmp_path / "projector" / "mm_projector.bin")
    merged = write_lora(source, tmp_path / "lora")
    folder = copied(tower_inside=False)
    for path in (folder, tmp_path / "projector", tmp_path / "lora"):
        edit_config(path, mm_vision_tower="openai/clip")
    broken = shutil.copytree(folder, tmp_path / "broken")
    edit_weights(broken, without("model.norm.weight"))
    for path in (folder, broken, tmp_path / "projector", tmp_path / "lora"):
        publish(path, f"liuhaotian/{path.name}")
    publish(tmp_path / "tower", "openai/clip")

    def fetched(name: str, base: str | None = None) -> Any:
        return load_pretrained_model(f"liuhaotian/{name}", base, device="cpu")

    expected = weights_of(source)
    _, model, processor, _ = fetched("llava")
    assert_same(model.state_dict(), expected)
    assert processor.size == {"shortest_edge": 56} and not log.messages
    assert_same(fetched("projector", "liuhaotian/llava")[1].state_dict(), expected | projector)
    torch.testing.assert_close(dict(fetched("lora", "liuhaotian/llava")[1].state_dict()), merged)
    with pytest.raises(ValueError, match=r"liuhaotian/broken do not fit .* missing .* model\.norm\.weight"):
        fetched("broken")
    with pytest.raises(ValueError, match=r"liuhaotian/lora holds a LoRA adapter: give"):
        fetched("lora")


# Parts that complete a base


@pytest.fixture
def language_model(make_checkpoint, tmp_path: Path) -> Path:
    """The plain language model of a checkpoint."""
    folder = tmp_path / "vicuna"
    folder.mkdir()
    vision = ("model.mm_projector.", "model.vision_tower.")
    weights = {key: value for key, value in weights_of(make_checkpoint()).items() if not key.startswith(vision)}
    save_safetensors(weights, folder / FILE)
    values = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith("mm_")}
    (folder / "config.json").write_text(
        json.dumps({**values, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("base", ["language_model", "llava"])
@pytest.mark.parametrize(("suffix", "prefix"), [(".bin", "model."), (".bin", ""), (".safetensors", "model.")])
def test_projector(base: str, suffix: str, prefix: str, make_checkpoint, language_model, tmp_path: Path):
    source = make_checkpoint()
    projector = write_part(source, tmp_path / "projector")
    stored = {prefix + key.removeprefix("model."): value for key, value in projector.items()}
    save = save_safetensors if suffix == ".safetensors" else torch.save
    save(stored, tmp_path / "projector" / f"mm_projector{suffix}")
    model = load(tmp_path / "projector", language_model if base == "language_model" else source)
    assert_same(model.state_dict(), weights_of(source) | projector)


def test_projectors_tower_is_relative_to_its_own_folder(make_checkpoint, language_model, copied, tmp_path: Path):
    projector = write_part(copied(), tmp_path / "projector")
    torch.save(projector, tmp_path / "projector" / "mm_projector.bin")
    (tmp_path / "tower").rename(tmp_path / "projector" / "encoder")
    edit_config(tmp_path / "projector", mm_vision_tower="encoder")
    model = load(tmp_path / "projector", language_model)
    assert_same(model.state_dict(), weights_of(make_checkpoint()) | projector)


@pytest.mark.parametrize(("base", "suffix"), [("language_model", ".bin"), ("llava", ".safetensors")])
def test_lora(base: str, suffix: str, make_checkpoint, language_model, tmp_path: Path, recwarn):
    merged = write_lora(make_checkpoint(), tmp_path / "lora", suffix)
    model = load(tmp_path / "lora", language_model if base == "language_model" else make_checkpoint())
    torch.testing.assert_close(dict(model.state_dict()), merged)
    assert type(model) is LlavaLlamaForCausalLM and generate(model).shape == (1, 4)
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]  # of the tower, says peft


def test_lora_needs_peft(make_checkpoint, tmp_path: Path, unread, monkeypatch: pytest.MonkeyPatch):
    write_lora(make_checkpoint(), tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        load(tmp_path / "lora", make_checkpoint())


# transformers' own entrances


def test_from_pretrained(make_checkpoint, language_model, copied, log):
    expected = weights_of(make_checkpoint())
    folder = copied(tower_inside=False)
    assert_same(LlavaLlamaForCausalLM.from_pretrained(folder).state_dict(), expected)
    assert type(AutoConfig.from_pretrained(folder)) is LlavaLlamaForCausalLM.config_class
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(model) is LlavaLlamaForCausalLM and model.dtype == torch.bfloat16
    assert model.get_vision_tower().config._attn_implementation == "eager"
    config = AutoConfig.from_pretrained(folder, mm_vision_select_feature="cls_patch")
    model, info = LlavaLlamaForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert model.get_vision_tower().select_feature == "cls_patch" and not info["unexpected_keys"]
    assert not log.messages
    assert LlavaLlamaForCausalLM.from_pretrained(language_model).get_vision_tower() is None  # to train from

    model = LlavaLlamaForCausalLM(config)
    model.load_state_dict(expected, strict=True)
    assert_same(model.state_dict(), expected)
    edit_weights(folder, without("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 missing from the checkpoint, such as model\.norm\.weight"):
        LlavaLlamaForCausalLM.from_pretrained(folder)


def test_only_the_one_report_is_kept_back(copied, log):
    folder = copied(tower_inside=False)
    with no_load_report():
        LlamaForCausalLM.from_pretrained(folder)
        assert "LOAD REPORT" not in log.text
        warn = logging.getLogger("transformers.modeling_utils").warning
        warn("something else")
        thread = Thread(target=warn, args=["LOAD REPORT of another thread"])
        thread.start()
        thread.join()
    assert log.messages[-2:] == ["something else", "LOAD REPORT of another thread"]
    LlamaForCausalLM.from_pretrained(folder)
    assert "LlamaForCausalLM LOAD REPORT" in log.messages[-1]


# Tokens


@pytest.mark.parametrize(
    ("config", "vocabulary", "added"),
    [
        ({"mm_use_im_patch_token": False}, 480, []),
        ({"mm_use_im_patch_token": None}, 480, ["<im_patch>"]),  # absent: as if true
        ({"mm_use_im_patch_token": True, "mm_use_im_start_end": True}, 480, ["<im_patch>", "<im_start>", "<im_end>"]),
        ({"mm_use_im_patch_token": True}, 512, ["<im_patch>"]),  # padded: there is room
    ],
)
def test_marker_tokens(config: dict[str, Any], vocabulary: int, added: list[str], copied, make_checkpoint):
    folder = copied(vocab_size=vocabulary)
    edit_config(folder, *(key for key, value in config.items() if value is None), **config)
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert tokenizer.convert_tokens_to_ids(added) == list(range(480, 480 + len(added))) and len(tokenizer) == 480 + len(
        added
    )
    rows = max(vocabulary, len(tokenizer))
    embeddings = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert [len(weight) for weight in embeddings] == [rows, rows] and model.config.vocab_size == rows
    expected = weights_of(folder)
    assert torch.equal(embeddings[0][:vocabulary], expected["model.embed_tokens.weight"])
    assert torch.equal(embeddings[1][:vocabulary], expected["lm_head.weight"])

"""``visionzip convert``: one checkpoint in both layouts, bit for bit, with all that goes with its weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)

import llava.commands.convert
from checkpoints import (
    NEXT,
    SIGLIP,
    edit_config,
    edit_weights,
    write_checkpoint,
    write_qwen_tokenizer,
)
from layouts import LAYOUTS, assert_same, convert, weights_of, write_native
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints.configs import read_config
from llava.model.tokenizer import load_tokenizer

MODELS = {
    "llama": {},
    "next_llama": NEXT,
    "next_mistral": {"model_type": "llava_mistral", **NEXT},
    "qwen": {"model_type": "llava_qwen"},
    "qwen_tied": {"model_type": "llava_qwen", "tie_word_embeddings": True},
    "siglip": {"vision": SIGLIP},
    "next_siglip": {"vision": SIGLIP, **NEXT},
    "cls_patch": {"mm_vision_select_feature": "cls_patch"},
    "rope": {"rope_theta": 1e6, "mm_vision_select_layer": -3},
}
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def settings(folder: Path) -> dict[str, Any]:
    """What is left of a config when one leaves out where it lies and what is written by every save."""
    config = read_config(str(folder))[1].to_dict()
    return {key: config[key] for key in config.keys() - {"_name_or_path", "dtype", "mm_vision_config"}}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_there_and_back(options: dict[str, Any], make_checkpoint, tmp_path: Path, capsys):
    """The weights are the same bits, the config says the same, and transformers finds what it would have written."""
    source = make_checkpoint(**options)
    assert convert(source, tmp_path / "native", "transformers") == 0
    kind = "LlavaNextForConditionalGeneration" if "image_aspect_ratio" in options else "LlavaForConditionalGeneration"
    assert f"wrote {tmp_path / 'native'}: {kind}, 0.0 GB" in capsys.readouterr().out
    assert convert(tmp_path / "native", tmp_path / "back", "original") == 0
    assert_same(weights_of(tmp_path / "back"), weights_of(source))
    assert settings(tmp_path / "back") == settings(source)

    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(model).__name__ == kind
    assert not any(info.values())
    model.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "native"), weights_of(tmp_path / "saved"))


def test_the_vocabulary(make_checkpoint, tmp_path: Path):
    """Two tokens more, and rows up to a multiple of 64, as llava-hf has it: 480 and 2 are 512, 32000 and 2 are 32064.

    Of new rows only the head's could matter: the mean of all logits is never the largest.
    """
    source = make_checkpoint()
    convert(source, tmp_path / "native", "transformers")
    config = AutoConfig.from_pretrained(tmp_path / "native")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "native").tokenizer
    assert (config.image_token_index, config.text_config.vocab_size, len(tokenizer)) == (480, 512, 482)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [480, 481]
    assert tokenizer.pad_token_id == GenerationConfig.from_pretrained(tmp_path / "native").pad_token_id == 481
    before, after = weights_of(source), weights_of(tmp_path / "native")
    for key, name in zip(("model.embed_tokens.weight", "lm_head.weight"), VOCABULARY, strict=True):
        assert torch.equal(after[name][:480], before[key])
        torch.testing.assert_close(after[name][480:], before[key].mean(0).expand(32, -1))


def test_rows_to_spare_are_used(copied, tmp_path: Path):
    """Qwen's vocabulary is larger than its tokenizer: nothing grows, and nothing is cut on the way back."""
    source = copied(model_type="llava_qwen")
    (source / "tokenizer.model").unlink()
    write_qwen_tokenizer(source)
    convert(source, tmp_path / "native", "transformers")
    config = AutoConfig.from_pretrained(tmp_path / "native")
    assert (config.image_token_index, config.text_config.vocab_size) == (259, 480)
    edit_config(tmp_path / "native", "original_llava")  # as if llava-hf had converted it
    convert(tmp_path / "native", tmp_path / "back", "original")
    assert_same(weights_of(tmp_path / "back"), weights_of(source))
    assert "<image>" not in load_tokenizer(tmp_path / "back").get_vocab()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_shards(layout: str, copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Read in any layout; written in shards, one of which is in memory at a time."""
    source = copied()
    expected = weights_of(source)
    LAYOUTS[layout](source)
    monkeypatch.setattr(llava.commands.convert, "_SHARD_BYTES", 100_000)
    convert(source, tmp_path / "native", "transformers")
    index = json.loads((tmp_path / "native/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "native").glob("*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert all(file.stat().st_size < 110_000 for file in files)
    assert not any(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "native", output_loading_info=True)[1].values()
    )
    monkeypatch.undo()
    convert(tmp_path / "native", tmp_path / "back", "original")
    assert_same(weights_of(tmp_path / "back"), expected)


def test_types_stay(copied, tmp_path: Path):
    """Of each weight; the config names that of most."""
    source = copied()
    edit_weights(
        source, lambda all_: {key: value if "mm_projector" in key else value.bfloat16() for key, value in all_.items()}
    )
    convert(source, tmp_path / "native", "transformers")
    assert {value.dtype for key, value in weights_of(tmp_path / "native").items() if "projector" not in key} == {
        torch.bfloat16
    }
    assert AutoConfig.from_pretrained(tmp_path / "native").dtype == torch.bfloat16
    convert(tmp_path / "native", tmp_path / "back", "original")
    assert_same(weights_of(tmp_path / "back"), weights_of(source))
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tower_beside_the_checkpoint(copied, tmp_path: Path):
    """transformers has the tower inside, and so does what comes back: it needs no other folder."""
    source = copied(tower_inside=False)
    expected = dict(load_pretrained_model(str(source), device="cpu")[1].state_dict())
    convert(source, tmp_path / "native", "transformers")
    shutil.rmtree(tmp_path / "tower")
    shutil.rmtree(source)
    convert(tmp_path / "native", tmp_path / "back", "original")
    _, model, image_processor, _ = load_pretrained_model(str(tmp_path / "back"), device="cpu")
    assert_same(dict(model.state_dict()), expected)
    assert model.config.mm_vision_tower == str(tmp_path / "tower")  # the name stays
    assert image_processor.crop_size["height"] == 56


def test_the_setting_and_the_generation_config_are_carried_over(copied, tmp_path: Path):
    source = copied()
    edit_config(source, visionzip={"dominant": 3, "contextual": 2})
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}')  # Vicuna's
    convert(source, tmp_path / "native", "transformers")
    assert AutoConfig.from_pretrained(tmp_path / "native").visionzip == {"dominant": 3, "contextual": 2}
    written = json.loads((tmp_path / "native/generation_config.json").read_text())
    assert written == {"temperature": 0.9, "top_p": 0.6, "pad_token_id": 481}
    edit_config(tmp_path / "native", visionzip={"dominant": 4, "contextual": 1})  # zipped anew
    convert(tmp_path / "native", tmp_path / "back", "original")
    model = load_pretrained_model(str(tmp_path / "back"), device="cpu")[1]
    assert (model.get_vision_tower().visionzip.dominant, model.get_vision_tower().visionzip.contextual) == (4, 1)
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == written | {"pad_token_id": 0}


# llava-hf's checkpoints: nothing of the original config is in them


@pytest.mark.parametrize("old_names", [True, False], ids=["old_names", "new_names"])
@pytest.mark.parametrize("is_next", [False, True], ids=["1.5", "next"])
def test_from_llava_hf_and_back(is_next: bool, old_names: bool, tmp_path: Path):
    """All rows that stand for text come back; the others are made anew."""
    write_native(tmp_path / "native", is_next=is_next, old_names=old_names)
    assert convert(tmp_path / "native", tmp_path / "llava", "original") == 0
    tokenizer, model, image_processor, _ = load_pretrained_model(str(tmp_path / "llava"), device="cpu")
    assert model.config.vocab_size == len(tokenizer) == 480
    assert model.config.image_aspect_ratio == ("anyres" if is_next else "pad")
    assert image_processor.image_mean == (0.1, 0.2, 0.3)
    if is_next:  # (width, height) here
        assert model.config.image_grid_pinpoints == [[112, 56], [56, 112], [56, 168]]
    assert tokenizer("<s>", add_special_tokens=False).input_ids == [1]
    assert "<image>" not in tokenizer.get_vocab()

    assert convert(tmp_path / "llava", tmp_path / "again", "transformers") == 0
    expected = weights_of(tmp_path / "native")
    if not old_names:  # transformers 5 leaves out what vLLM needs
        assert "vision_tower.embeddings.class_embedding" in expected
        expected = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key): expected[key] for key in expected}
    actual = weights_of(tmp_path / "again")
    for key in VOCABULARY:
        assert actual[key].shape == expected[key].shape == (512, 32)
        actual[key], expected[key] = actual[key][:480], expected[key][:480]
    assert_same(actual, expected)


def test_names_of_the_released_versions_in_between(tmp_path: Path):
    """transformers 4.52 and later saved some checkpoints with the modules' own names."""
    write_native(tmp_path / "native", old_names=False)
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "expected", "original")
    edit_weights(tmp_path / "native", lambda _: {key: value.clone() for key, value in native.state_dict().items()})
    with safe_open(tmp_path / "native/model.safetensors", "pt") as file:
        assert "model.language_model.norm.weight" in file.keys()  # noqa: SIM118 - not a dict
    convert(tmp_path / "native", tmp_path / "llava", "original")
    assert_same(weights_of(tmp_path / "llava"), weights_of(tmp_path / "expected"))


def test_old_files(tmp_path: Path):
    """Buffers that older versions saved, a newline vector that nothing reads, ``<im_patch>`` by LLaVA's default."""
    source = write_checkpoint(tmp_path / "llava")
    expected = weights_of(source)
    edit_config(source, "mm_use_im_patch_token", "image_grid_pinpoints")
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "model.image_newline": torch.ones(32),
    }
    edit_weights(source, lambda all_: all_ | old)
    assert convert(source, tmp_path / "native", "transformers") == 0
    assert AutoConfig.from_pretrained(tmp_path / "native").image_token_index == 481  # after <im_patch>
    assert convert(tmp_path / "native", tmp_path / "back", "original") == 0
    assert_same(weights_of(tmp_path / "back"), expected)


def test_what_the_config_does_not_say_stays_unsaid(copied, tmp_path: Path):
    """LLaVA's defaults hold again: images are cropped, not padded, and ``<im_patch>`` is added."""
    source = copied()
    edit_config(source, "image_aspect_ratio", "mm_use_im_patch_token", "mm_use_im_start_end")
    convert(source, tmp_path / "native", "transformers")
    convert(tmp_path / "native", tmp_path / "back", "original")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert not config.keys() & {"image_aspect_ratio", "mm_use_im_patch_token", "mm_use_im_start_end"}
    adapter = load_pretrained_model(str(tmp_path / "native"), device="cpu")[1]
    assert getattr(adapter.config, "image_aspect_ratio", None) is None

"""Mini-Gemini's checkpoints: the original layout, its high-resolution tower, and what does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mini_gemini import convnext, openclip_weights, pixels
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from checkpoints import LANGUAGE_MODEL, SIGLIP, edit_config, edit_weights, write_tokenizer
from layouts import device_map_for
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_mode_for
from llava.model import MGMLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.openclip_encoder import OpenCLIPVisionTower
from llava.model.multimodal_encoder.tower_files import resolve_tower_path
from visionzip import visionzip

CLIP_NAME = "model_zoo/OpenAI/clip-vit-large-patch14-336"  # as the released config.json have them
CONVNEXT_NAME = "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"


@pytest.fixture
def copied(make_mgm: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint for this test alone, with the folders of its towers beside it, ``tower`` and ``aux``."""
    source = make_mgm()
    for name in ("tower", "aux"):
        shutil.copytree(source.with_name(f"{source.name}-{name}"), tmp_path / name)
    folder = shutil.copytree(source, tmp_path / "MGM-tiny")
    edit_config(folder, mm_vision_tower=str(tmp_path / "tower"), mm_vision_tower_aux=str(tmp_path / "aux"))
    return folder


class TestTower:
    def test_its_maps_are_those_of_transformers_convnext(self, make_mgm) -> None:
        """Alone, with OpenCLIP's own file; widths and depths are read from it too."""
        folder = make_mgm()
        tower = OpenCLIPVisionTower(str(folder.with_name(folder.name + "-aux")), SimpleNamespace())
        assert tower.hidden_size == 60
        maps = tower(pixels(2))
        assert [tuple(stage.shape) for stage in maps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
        with torch.no_grad():
            expected = convnext()(pixels(2), output_hidden_states=True).hidden_states[1:]
        for stage, other in zip(maps, expected, strict=True):
            torch.testing.assert_close(stage, other, atol=1e-4, rtol=1e-4)

    def test_the_checkpoint_may_have_its_weights(self, make_mgm, load_mgm, tmp_path: Path) -> None:
        whole = make_mgm(aux_inside=True)
        keys = {key for key in load_file(whole / "model.safetensors") if "tower_aux" in key}
        assert {"model.vision_tower_aux.vision_stem.0.weight", "model.vision_tower_aux.vision_stem.1.bias"} < keys
        assert "model.vision_tower_aux.vision_stages.1.downsample.1.weight" in keys
        assert "model.vision_tower_aux.vision_stages.2.blocks.2.mlp.fc2.bias" in keys
        other = shutil.copytree(whole, tmp_path / "MGM-tiny")
        edit_weights(other, lambda weights: weights | {key: 2 * weights[key] for key in keys})
        doubled = load_pretrained_model(str(other), device="cpu")[1].get_vision_tower_aux()
        for key, value in load_mgm(aux_inside=True).get_vision_tower_aux().state_dict().items():
            torch.testing.assert_close(doubled.state_dict()[key], 2 * value)

    def test_stays_as_it_is_in_training(self, load_mgm) -> None:
        assert not any(parameter.requires_grad for parameter in load_mgm().get_vision_tower_aux().parameters())


class TestCheckpoint:
    @pytest.mark.parametrize("aux_inside", [False, True])
    def test_loads_the_original_layout_with_nothing_missing_or_left_over(self, make_mgm, aux_inside: bool) -> None:
        folder = make_mgm(aux_inside=aux_inside)
        _, model, processor, length = load_pretrained_model(str(folder), None, "MGM-7B", device="cpu")
        assert isinstance(model, MGMLlamaForCausalLM)
        assert (length, processor.crop_size["height"]) == (2048, 56)
        own = model.state_dict()
        for key, value in load_file(folder / "model.safetensors").items():
            assert torch.equal(own.pop(key), value), key
        assert all(key.startswith("model.vision_tower_aux.") for key in own)
        for key, value in openclip_weights(convnext()).items():
            if key.startswith(("visual.trunk.stem.", "visual.trunk.stages.")):
                key = key.replace("visual.trunk.", "model.vision_tower_aux.vision_")  # noqa: PLW2901
                assert torch.equal(model.state_dict()[key], value), key

    def test_early_uploads_have_another_name(self, copied: Path) -> None:
        edit_config(copied, architectures=["MiniGeminiLlamaForCausalLM"], model_type="mini_gemini")
        assert isinstance(load_pretrained_model(str(copied), device="cpu")[1], MGMLlamaForCausalLM)

    def test_its_towers_have_the_names_of_its_own_repository(
        self, copied: Path, publish, monkeypatch, load_mgm
    ) -> None:
        """``model_zoo/OpenAI/…``: folders there if there are such, else what the hub has them as."""
        expected = load_mgm().encode_images(pixels())
        edit_config(copied, mm_vision_tower=CLIP_NAME, mm_vision_tower_aux=CONVNEXT_NAME)
        prefix = "model.vision_tower."
        edit_weights(copied, lambda weights: {k: v for k, v in weights.items() if not k.startswith(prefix)})
        publish(copied.parent / "tower", "openai/clip-vit-large-patch14-336")
        publish(copied.parent / "aux", "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup")
        for path in (str(copied), publish(shutil.copytree(copied, copied.parent / "more"), "YanweiLi/MGM-7B")):
            model = load_pretrained_model(path, device="cpu")[1]
            assert torch.equal(model.encode_images(pixels()), expected)
        (copied.parent / CLIP_NAME).mkdir(parents=True)
        monkeypatch.chdir(copied.parent)
        assert resolve_tower_path(CLIP_NAME, SimpleNamespace()) == CLIP_NAME

    def test_projections_alone_on_a_language_model(self, make_mgm, load_mgm, tmp_path: Path) -> None:
        """``mm_projector.bin`` of the first stage of its training has all that is not the language model's."""
        source, folder, base = make_mgm(aux_inside=True), tmp_path / "MGM-7B-Pretrain", tmp_path / "vicuna"
        for path in (folder, base):
            path.mkdir()
            shutil.copy(source / "config.json", path)
        weights = load_file(source / "model.safetensors")
        parts = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
        text = {key: value for key, value in weights.items() if key.startswith(parts)}
        save_file(text, base / "model.safetensors", metadata={"format": "pt"})
        own = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith(("mm_", "image_"))}
        (base / "config.json").write_text("{}")
        edit_config(base, model_type="llama", architectures=["LlamaForCausalLM"], **own)
        write_tokenizer(base)
        torch.save({key: value for key, value in weights.items() if key not in text}, folder / "mm_projector.bin")
        model = load_pretrained_model(str(folder), str(base), device="cpu")[1]
        expected = load_mgm(aux_inside=True).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("bits", [4, 8])
    def test_only_the_language_model_is_quantised(self, make_mgm, load_mgm, bits: int) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        model = load_pretrained_model(str(make_mgm(hidden_size=64)), device="cpu", **{f"load_{bits}bit": True})[1]
        kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        quantised = {name for name, module in linears.items() if isinstance(module, kind)}
        assert quantised == {name for name in linears if name.startswith("model.layers.")}
        torch.testing.assert_close(model.encode_images(pixels()), load_mgm(hidden_size=64).encode_images(pixels()))
        prompt = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7]])
        answer = visionzip(model, 4, 2).generate(prompt, images=pixels(), max_new_tokens=3, min_new_tokens=3)
        assert answer.shape == (1, 3)

    @pytest.mark.parametrize("room", [0.5, 0.9])
    def test_what_does_not_fit_on_a_device_is_the_end_of_the_language_model(self, make_mgm, room: float) -> None:
        config = AutoConfig.from_pretrained(make_mgm(), num_hidden_layers=60)
        device_map, offloaded = device_map_for(MGMLlamaForCausalLM, config, room)
        assert device_map["model.vision_tower_aux"] == "cpu"  # in one piece
        assert offloaded and offloaded <= {"layers", "norm", "rotary_emb"}

    def test_saved_and_loaded_again(self, load_mgm, tmp_path: Path) -> None:
        model = load_mgm()
        model.save_pretrained(tmp_path / "saved")
        write_tokenizer(tmp_path / "saved")
        edit_config(tmp_path / "saved", mm_vision_tower="gone/clip", mm_vision_tower_aux="gone/convnext")
        again = load_pretrained_model(str(tmp_path / "saved"), device="cpu")[1]
        assert again.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(again.encode_images(pixels()), model.encode_images(pixels()))

    def test_its_name_chooses_its_template(self) -> None:
        for name in ("MGM-7B", "MGM-13B", "MGM-7B-HD", "MGM-13B-HD"):
            assert conv_mode_for(name) == "vicuna_v1"
        assert conv_mode_for("MGM-34B") == "chatml_direct"

    def test_a_saved_model_comes_back_zipped(self, load_mgm, tmp_path: Path) -> None:
        model = visionzip(load_mgm(), 4, 2, merge="average")
        model.save_pretrained(tmp_path / "saved")
        again = MGMLlamaForCausalLM.from_pretrained(tmp_path / "saved")
        assert again.config.visionzip == model.config.visionzip
        assert torch.equal(again.encode_images(pixels()), model.encode_images(pixels()))


class TestBadInput:
    def fails(self, folder: Path, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            load_pretrained_model(str(folder), device="cpu")

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"image_size_aux": 120}, r"image_size_aux=120 does not fit 4 x 4 patches: it must be a multiple of 16"),
            ({"image_size_aux": None}, r"needs image_size_aux \(768\)"),
            ({"mm_vision_tower_aux": None}, r"needs mm_vision_tower_aux"),
            ({"image_grid": 3}, r"image_grid=3 is not supported"),
            ({"mm_hidden_size_aux": 2880}, r"mm_hidden_size_aux=2880, but the vision tower .* has 60 channels"),
            ({"mm_vision_select_feature": "cls_patch"}, r"'cls_patch' is not supported: Mini-Gemini mines for patches"),
        ],
    )
    def test_a_config_that_does_not_fit(self, copied: Path, unread, fields: dict[str, Any], match: str) -> None:
        edit_config(copied, **fields)
        self.fails(copied, ValueError, match)

    def test_a_tower_without_a_cls_token(self, make_mgm, unread) -> None:
        self.fails(make_mgm(vision=SIGLIP), ValueError, "SigLipVisionTower as mm_vision_tower is not supported")

    def test_no_high_resolution_tower(self, copied: Path, unread, offline) -> None:
        edit_config(copied, mm_vision_tower_aux="model_zoo/OpenAI/openclip-convnext-large")
        self.fails(copied, OSError, "no open_clip_model.safetensors or .* mm_vision_tower_aux='model_zoo/OpenAI/openc")

    def test_a_tower_that_is_no_convnext(self, copied: Path, unread) -> None:
        torch.save({"visual.conv1.weight": torch.ones(2, 2)}, copied.parent / "aux" / "open_clip_pytorch_model.bin")
        self.fails(copied, ValueError, "is not OpenCLIP's ConvNeXt")

    def test_a_convnext_whose_norms_are_others(self, copied: Path, unread) -> None:
        """OpenCLIP's XXLarge adds 1e-5 to its variances, not 1e-6; no released Mini-Gemini has it."""
        weights = {"visual.trunk.stages.0.blocks.0.gamma": torch.ones(384)}
        torch.save(weights, copied.parent / "aux" / "open_clip_pytorch_model.bin")
        self.fails(copied, ValueError, "is OpenCLIP's ConvNeXt-XXLarge")

    def test_a_tower_that_lacks_a_weight(self, copied: Path, unread) -> None:
        weights = openclip_weights(convnext())
        del weights["visual.trunk.stages.1.blocks.0.norm.bias"]
        torch.save(weights, copied.parent / "aux" / "open_clip_pytorch_model.bin")
        self.fails(copied, ValueError, "lacks 1 weights, .* such as vision_stages.1.blocks.0.norm.bias")

    def test_a_checkpoint_that_lacks_a_projection(self, copied: Path, unread) -> None:
        edit_weights(copied, lambda weights: {k: v for k, v in weights.items() if "vlm_uni_aux" not in k})
        self.fails(copied, ValueError, "4 missing from the checkpoint, such as model.vlm_uni_aux_projector.0.bias")

    def test_a_checkpoint_with_a_part_of_the_tower(self, make_mgm, unread, tmp_path: Path) -> None:
        folder = shutil.copytree(make_mgm(aux_inside=True), tmp_path / "MGM-tiny")
        gone = "model.vision_tower_aux.vision_stem.0.weight"
        edit_weights(folder, lambda weights: {key: value for key, value in weights.items() if key != gone})
        self.fails(folder, ValueError, f"1 missing from the checkpoint, such as {gone}")

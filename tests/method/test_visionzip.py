"""``visionzip`` and ``unzip``: one line switches the compression of a model on and off, and touches nothing else."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from attaching import classes_of, same, snapshot
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM, SiglipVisionModel

from checkpoints import CLIP, SIGLIP, write_tokenizer
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from visionzip import VisionZipConfig, unzip, visionzip

EDGE, PATCHES = 112, 64  # of the towers here; CLIP has the CLS token besides
PROMPT = torch.tensor([[1, 20, IMAGE_TOKEN_INDEX, 30, 40]])


@pytest.fixture
def folders(make_checkpoint: Any) -> dict[str, Path]:
    """A checkpoint with each tower."""
    towers = {"clip": CLIP, "siglip": SIGLIP}
    return {name: make_checkpoint(vision={**vision, "image_size": EDGE}) for name, vision in towers.items()}


@pytest.fixture
def model(folders: dict[str, Path]) -> LlavaLlamaForCausalLM:
    return load(folders["clip"])


def load(folder: Path) -> LlavaLlamaForCausalLM:
    return load_pretrained_model(str(folder), device="cpu")[1]


def pixels(seed: int = 0) -> Tensor:
    return torch.randn(1, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def visual_tokens(model: nn.Module) -> Tensor:
    """(n, hidden_size), what the language model sees of an image."""
    return model.encode_images(pixels())[0]


@torch.no_grad()
def outputs(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Logits of the prompt with its visual tokens, and an answer."""
    images = pixels(seed)
    answer = model.generate(PROMPT, images=images, max_new_tokens=4, do_sample=False)
    return [model(PROMPT, images=images).logits, answer]


def load_and_run(pickled: bytes) -> list[list[Any]]:
    """For another process, which sends back plain lists."""
    return [tensor.tolist() for tensor in outputs(pickle.loads(pickled))]


# --- on, again, off ---


def test_in_place_and_the_same_object(model: LlavaLlamaForCausalLM):
    assert visionzip(model, dominant=16, contextual=4) is model
    assert len(visual_tokens(model)) == 20
    assert unzip(model) is model
    assert len(visual_tokens(model)) == PATCHES


def test_default_is_the_papers_64_tokens(model: LlavaLlamaForCausalLM):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visionzip(model)
    compressed = model.get_vision_tower().compress(pixels())
    assert compressed.dominant_indices.shape == (1, 54) and compressed.target_indices.shape == (1, 10)
    assert len(visual_tokens(model)) == 64


def test_calling_again_configures_anew(model: LlavaLlamaForCausalLM, folders: dict[str, Path]):
    visionzip(visionzip(model, dominant=16, contextual=4, merge="average"), dominant=8, contextual=2)
    assert same(outputs(model), outputs(visionzip(load(folders["clip"]), dominant=8, contextual=2)))
    assert model.config.visionzip == VisionZipConfig(8, 2).to_dict()


def test_unzip_restores_outputs_and_every_attribute(model: LlavaLlamaForCausalLM):
    before, expected = snapshot(model), outputs(model)
    visionzip(model, dominant=16, contextual=4)
    assert not same(outputs(model)[:1], expected[:1])
    unzip(model)
    assert snapshot(model) == before
    assert same(outputs(model), expected)
    assert snapshot(unzip(model)) == before  # once more is harmless


def test_no_class_is_modified(model: LlavaLlamaForCausalLM):
    before = classes_of(model)
    assert {LlavaLlamaForCausalLM, LlamaForCausalLM, CLIPVisionModel, CLIPVisionTower, nn.Module} < before.keys()
    visionzip(model, dominant=16, contextual=4)
    assert classes_of(model) == before
    outputs(model)
    unzip(model)
    assert classes_of(model) == before


@pytest.mark.parametrize("setting", [{"merge": "average"}, {"layer": -3}, {"dominant": 17}, {"contextual": 5}])
@pytest.mark.filterwarnings("ignore:VisionZip reads encoder layer")
def test_every_setting_matters(setting: dict[str, Any], model: LlavaLlamaForCausalLM):
    plain = visual_tokens(visionzip(model, dominant=16, contextual=4))
    other = visual_tokens(visionzip(model, **{"dominant": 16, "contextual": 4, **setting}))
    assert not torch.equal(plain, other)


# --- models do not affect each other ---


@pytest.fixture
def pair(folders: dict[str, Path]) -> list[LlavaLlamaForCausalLM]:
    """A zipped and a plain model in one process."""
    return [visionzip(load(folders["clip"]), dominant=16, contextual=4), load(folders["clip"])]


def test_a_zipped_and_a_plain_model_interleaved(pair: list[LlavaLlamaForCausalLM]):
    alone = [outputs(pair[0]), outputs(pair[1])]
    assert alone[0][0].shape[1] == 4 + 20 and alone[1][0].shape[1] == 4 + PATCHES
    for _ in range(2):
        assert same(outputs(pair[0]), alone[0])
        assert same(outputs(pair[1]), alone[1])


@pytest.mark.parametrize("which", [(0, 1), (0, 0)], ids=["zipped and plain", "the same zipped one"])
def test_two_threads_at_once(which: tuple[int, int], pair: list[LlavaLlamaForCausalLM]):
    barrier = Barrier(2, timeout=60)
    rounds = 5

    def run(index: int, seed: int) -> list[Tensor]:
        barrier.wait()
        return [tensor for _ in range(rounds) for tensor in outputs(pair[index], seed)]

    sequential = [outputs(pair[index], seed) * rounds for seed, index in enumerate(which)]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(run, which, range(2)))
    torch.testing.assert_close(at_once, sequential)


def test_a_copy_is_zipped_and_independent(model: LlavaLlamaForCausalLM):
    plain = outputs(model)
    visionzip(model, dominant=16, contextual=4)
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert same(outputs(twin), expected)
    assert same(outputs(unzip(twin)), plain)
    assert same(outputs(model), expected) and model.config.visionzip["dominant"] == 16


# --- the setting is kept with the model ---


def test_the_setting_is_a_plain_dict_in_the_config(model: LlavaLlamaForCausalLM):
    visionzip(model, dominant=16, contextual=4)
    assert type(model.config.visionzip) is dict
    assert model.config.visionzip == {"dominant": 16, "contextual": 4, "layer": -2, "merge": "released"}
    assert not hasattr(unzip(model).config, "visionzip")


def test_a_saved_model_comes_back_zipped(model: LlavaLlamaForCausalLM, tmp_path: Path):
    visionzip(model, dominant=16, contextual=4, merge="average").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["visionzip"] == model.config.visionzip
    for again in (LlavaLlamaForCausalLM.from_pretrained(tmp_path), load(tmp_path)):
        assert same(outputs(again), outputs(model))
        assert again.config.visionzip == model.config.visionzip
        assert len(visual_tokens(unzip(again))) == PATCHES


def test_without_arguments_the_stored_setting_is_applied(model: LlavaLlamaForCausalLM):
    model.config.visionzip = {"dominant": 16, "contextual": 4}
    visionzip(model)
    assert model.get_vision_tower().visionzip == VisionZipConfig(16, 4)
    assert len(visual_tokens(visionzip(model))) == 20


def test_a_pickled_model_is_zipped_in_another_process(model: LlavaLlamaForCausalLM):
    visionzip(model, dominant=16, contextual=4)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(load_and_run, pickle.dumps(model)).result()
    torch.testing.assert_close([torch.tensor(values) for values in there], outputs(model))


# --- what can be zipped ---


def test_a_bare_tower(model: LlavaLlamaForCausalLM):
    tower = model.get_vision_tower()
    plain = tower(pixels())
    assert visionzip(tower, dominant=16, contextual=4) is tower
    assert tower(pixels()).shape == (1, 20, 32)
    assert torch.equal(unzip(tower)(pixels()), plain)


def test_a_peft_model(model: LlavaLlamaForCausalLM):
    lora = LoraConfig(target_modules=r"model\.layers.*q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    plain = outputs(adapted)
    assert visionzip(adapted, dominant=16, contextual=4) is adapted
    assert outputs(adapted)[0].shape[1] == 4 + 20
    assert same(outputs(unzip(adapted)), plain)


def test_siglip_has_no_cls_token(folders: dict[str, Path]):
    model = visionzip(load(folders["siglip"]), dominant=16, contextual=4)
    tower = model.get_vision_tower()
    assert type(tower) is SigLipVisionTower
    compressed = tower.compress(pixels())
    features = unzip(tower)(pixels())[0]
    assert compressed.assignment.shape == (1, PATCHES)
    assert torch.equal(compressed.tokens[0, :16], features[compressed.dominant_indices[0]])


@pytest.mark.parametrize("name, encoder_class", [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)])
@pytest.mark.parametrize("zipped", [True, False])
@torch.no_grad()
def test_the_last_encoder_layer_never_runs(
    name: str, encoder_class: type[nn.Module], zipped: bool, folders: dict[str, Path]
):
    tower = load(folders[name]).get_vision_tower()
    encoder = encoder_class.from_pretrained(tower.vision_tower_name)
    expected = encoder(pixels(), output_hidden_states=True).hidden_states[-2]
    ran = []
    for index, layer in enumerate(tower.encoder.encoder.layers):
        layer.register_forward_hook(lambda *args, index=index: ran.append(index))
    if zipped:
        compressed = visionzip(tower, dominant=16, contextual=0).compress(pixels())
        torch.testing.assert_close(compressed.tokens[0], expected[0, compressed.dominant_indices[0]])
    else:
        torch.testing.assert_close(tower(pixels()), expected[:, -PATCHES:])
    assert ran == [0, 1, 2]  # of four


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_can_be_zipped(model: LlavaLlamaForCausalLM):
    """Before or after compiling; aot_eager traces as inductor does, without its compiler."""
    prompt = torch.tensor([[1, IMAGE_TOKEN_INDEX, 7]])
    compiled = torch.compile(model, backend="aot_eager")
    tower = torch.compile(model.get_vision_tower(), backend="aot_eager")
    for change in (lambda: visionzip(model, 5, 3), lambda: visionzip(model, 6, 2), lambda: unzip(model)):
        change()
        with torch.no_grad():
            expected = model(prompt, images=pixels()[:1]).logits
            torch.testing.assert_close(compiled(prompt, images=pixels()[:1]).logits, expected)
            torch.testing.assert_close(tower(pixels()), model.get_vision_tower()(pixels()))

"""``visionzip`` and ``unzip`` on models of transformers: what hangs on the model, settings, copies, and errors."""

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
import transformers
from attaching import classes_of, same, snapshot
from hf_models import (
    EDGE,
    FAMILIES,
    IMAGE,
    PATCHES,
    both,
    build,
    llava,
    pictures,
    text_config,
    vision_config,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Config,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from visionzip import VisionZipConfig, unzip, visionzip

K, M = 4, 2
TEXT = "what is <image> here"


def inputs_of(family: str, seed: int = 0, **options: Any) -> Any:
    images = pictures((90, 60), (60, 90))[seed]
    return FAMILIES[family][1]()(images=images, text=TEXT, return_tensors="pt", **options)


@torch.no_grad()
def outputs(model: Any, inputs: Any) -> list[Tensor]:
    return [model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)]


def load_and_run(pickled: bytes, inputs: Any) -> list[list[Any]]:
    """For another process, which sends back plain lists."""
    return [tensor.tolist() for tensor in outputs(pickle.loads(pickled), inputs)]


# --- on, again, off ---


@both
def test_unzip_restores_outputs_and_every_attribute(family: str):
    model, inputs = FAMILIES[family][0](), inputs_of(family)
    expected = outputs(model, inputs)
    before = snapshot(model)  # transformers sets up its own hooks in the first run
    assert visionzip(model, K, M) is model
    assert not same(outputs(model, inputs)[:1], expected[:1])
    assert unzip(model) is model
    assert snapshot(model) == before
    assert same(outputs(model, inputs), expected)
    assert snapshot(unzip(model)) == before  # once more is harmless


@both
def test_calling_again_configures_anew(family: str):
    make, inputs = FAMILIES[family][0], inputs_of(family)
    model = visionzip(visionzip(make(), K, M, merge="average"), 6, 1)
    assert same(outputs(model, inputs), outputs(visionzip(make(), 6, 1), inputs))
    assert len(model._forward_pre_hooks) == len(model.model._forward_pre_hooks) == 1


@both
def test_no_class_is_modified(family: str):
    model = FAMILIES[family][0]()
    before = classes_of(model)
    assert {CLIPVisionModel, nn.Module} < before.keys()
    outputs(visionzip(model, K, M), inputs_of(family))
    assert classes_of(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore:VisionZip reads encoder layer")
@pytest.mark.parametrize("setting", [{"merge": "average"}, {"layer": -3}, {"dominant": 5}, {"contextual": 3}], ids=str)
def test_every_setting_matters(setting: dict[str, Any]):
    inputs = inputs_of("llava")
    plain = outputs(visionzip(llava(), K, M), inputs)[0]
    other = outputs(visionzip(llava(), **{"dominant": K, "contextual": M, **setting}), inputs)[0]
    assert not torch.equal(plain[:, -1], other[:, -1])


def test_the_default_is_the_papers_64_tokens():
    """Of the 82 that 9 x 9 patches and the CLS token make."""
    model = build(LlavaForConditionalGeneration, large_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visionzip(model)
    features = model.get_image_features(torch.randn(2, 3, 126, 126)).pooler_output
    assert [len(image) for image in features] == [64, 64]
    assert model.config.visionzip == VisionZipConfig(54, 10).to_dict()


def large_config(**changes: Any) -> LlavaConfig:
    vision = vision_config(image_size=126)
    return LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=IMAGE, **changes)


def test_the_default_layer_is_the_one_that_the_projector_was_trained_on():
    """``vision_feature_layer`` counts hidden states, of which the embeddings are the first."""
    for given, layer in ((-1, -1), (3, 2), ([-2], -2)):
        model = visionzip(llava(vision_feature_layer=given), K, M)
        assert model.config.visionzip["layer"] == layer
        features = model.get_image_features(torch.randn(1, 3, EDGE, EDGE)).last_hidden_state[0, 0]
        assert torch.isfinite(features).all()


# --- models do not affect each other ---


def test_a_zipped_and_a_plain_model_interleaved():
    inputs = inputs_of("llava")
    models = [visionzip(llava(), K, M), llava(), visionzip(llava(), 6, 1)]
    alone = [outputs(model, inputs) for model in models]
    assert [row[0].shape[1] - alone[0][0].shape[1] for row in alone] == [0, PATCHES - K - M, 1]
    for _ in range(2):
        assert all(same(outputs(model, inputs), own) for model, own in zip(models, alone, strict=True))


def test_two_threads_at_once():
    model, barrier = visionzip(llava(), K, M), Barrier(2, timeout=60)
    prompts = [inputs_of("llava", seed) for seed in range(2)]
    expected = [outputs(model, inputs) for inputs in prompts]

    def run(inputs: Any) -> list[Tensor]:
        barrier.wait()
        return [tensor for _ in range(5) for tensor in outputs(model, inputs)]

    with ThreadPoolExecutor(2) as pool:
        assert all(same(found, own * 5) for found, own in zip(pool.map(run, prompts), expected, strict=True))


@both
def test_a_copy_is_zipped_and_independent(family: str):
    model, inputs = FAMILIES[family][0](), inputs_of(family)
    plain, expected = outputs(model, inputs), outputs(visionzip(model, K, M), inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.multi_modal_projector.linear_2.weight.mul_(2)
    assert same(outputs(model, inputs), expected)
    assert not same(outputs(twin, inputs)[:1], expected[:1])  # it has its own projector
    twin.load_state_dict(model.state_dict())
    assert same(outputs(twin, inputs), expected)
    assert same(outputs(unzip(twin), inputs), plain)
    assert same(outputs(model, inputs), expected) and model.config.visionzip["dominant"] == K


def test_a_pickled_model_is_zipped_in_another_process():
    model, inputs = visionzip(llava(), K, M), inputs_of("llava")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(load_and_run, pickle.dumps(model), dict(inputs)).result()
    torch.testing.assert_close([torch.tensor(values) for values in there], outputs(model, inputs))


# --- the setting is kept with the model ---


@both
def test_save_and_reload(family: str, tmp_path: Path):
    """Transformers' own class loads it as it is; ``visionzip`` without arguments applies the stored setting.

    The encoder's weights have the names that vLLM reads.
    """
    model, inputs = FAMILIES[family][0](), inputs_of(family)
    plain, zipped = outputs(model, inputs), outputs(visionzip(model, K, M, merge="average"), inputs)
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["visionzip"]
        == VisionZipConfig(K, M, merge="average").to_dict()
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        encoder = [name for name in file.keys() if name.startswith("vision_tower.")]  # noqa: SIM118 - not a dict
    assert encoder and all(name.startswith("vision_tower.vision_model.") for name in encoder)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again.eval()
    assert same(outputs(again, inputs), plain)
    assert same(outputs(visionzip(again), inputs), zipped)
    assert not hasattr(unzip(again).config, "visionzip")


# --- warnings and errors ---


def test_an_untested_version_warns_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.warns(UserWarning, match=r"tested with transformers 5\.23\.x, this is 5\.99\.0") as caught:
        visionzip(llava(), K, M)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("dominant, contextual", [(17, 0), (54, 10)], ids=str)
def test_a_budget_of_the_whole_sequence_warns_and_compresses_nothing(dominant: int, contextual: int):
    inputs = inputs_of("llava")
    with pytest.warns(UserWarning, match=f"is {dominant + contextual} tokens, but the vision tower has 17") as caught:
        model = visionzip(llava(), dominant, contextual)
    assert [warning.filename for warning in caught] == [__file__]
    assert outputs(model, inputs)[0].shape[1] == inputs["input_ids"].shape[1] + 1  # the CLS token too
    full = llava(vision_feature_select_strategy="full").get_image_features(inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(model.get_image_features(inputs["pixel_values"]).pooler_output[0], full)


def test_a_layer_that_the_projector_was_not_trained_on_warns():
    with pytest.warns(UserWarning, match=r"layer -3, but .* layer -2 \(vision_feature_layer\)") as caught:
        visionzip(llava(), K, M, layer=-3)
    assert [warning.filename for warning in caught] == [__file__]


WRONG_SETTINGS = [
    ({"dominant": 0}, ValueError, "dominant=0 is below 1"),
    ({"contextual": True}, TypeError, "contextual=True must be an integer"),
    ({"merge": "mean"}, ValueError, "merge='mean' is unknown"),
    ({"layer": 4}, ValueError, r"layer=4 is outside the vision tower's 4 layers \(-4 to 3\)"),
]


@pytest.mark.parametrize("setting, error, message", WRONG_SETTINGS, ids=[str(row[0]) for row in WRONG_SETTINGS])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_wrong_setting_changes_nothing(setting: dict[str, Any], error: type[Exception], message: str, zipped: bool):
    model = visionzip(llava(), 8, 2) if zipped else llava()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        visionzip(model, **setting)
    assert snapshot(model) == before


def test_a_missing_attribute_fails_at_once():
    """Not in the middle of a generation."""
    model = llava()
    del model.model.vision_tower.encoder.layers[2].self_attn.k_proj
    with pytest.raises(TypeError, match=r"CLIPVisionModel .* built differently \(CLIPAttention has no k_proj\)"):
        visionzip(model, K, M)
    model = llava()
    del model.model.multi_modal_projector
    with pytest.raises(TypeError, match=r"LlavaModel of transformers .* has no multi_modal_projector"):
        visionzip(model, K, M)
    assert not hasattr(model.config, "visionzip")


def test_another_kind_of_encoder():
    """Of those that transformers' LLaVA class takes (Pixtral's is a family of its own)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": EDGE, "patch_size": 14}
    vision = Dinov2Config(**sizes)
    config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=IMAGE)
    model = build(LlavaForConditionalGeneration, config)
    with pytest.raises(TypeError, match="CLIP and SigLIP encoders: the vision tower Dinov2Model"):
        visionzip(model, K, M)


def test_a_projector_of_several_layers():
    model = llava(vision_feature_layer=[-2, -1])
    with pytest.raises(ValueError, match=r"takes the hidden states \[-2, -1\] \(vision_feature_layer\)"):
        visionzip(model, K, M)


def test_an_unsupported_model():
    with pytest.raises(TypeError, match=r"does not support LlamaForCausalLM.*LlavaNextForConditionalGeneration"):
        visionzip(LlamaForCausalLM(text_config()))


def test_a_generate_of_the_users_own_is_used_and_comes_back():
    """As tools that log calls put it on the object: it is given the short prompts."""
    model, inputs = llava(), inputs_of("llava")
    stock, lengths = model.generate, []

    def logged(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return stock(*args, **kwargs)

    model.generate = logged
    visionzip(visionzip(model, 8, 1), K, M)
    expected = outputs(visionzip(llava(), K, M), inputs)
    assert same(outputs(model, inputs), expected)
    assert lengths == [inputs["input_ids"].shape[1] - PATCHES + K + M]
    assert unzip(model).generate is logged

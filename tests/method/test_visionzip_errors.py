"""What ``visionzip`` and ``unzip`` warn of and refuse, which changes nothing of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attaching import snapshot
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints import CLIP, LANGUAGE_MODEL, pixels
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.language_model.llava_llama import LlavaConfig
from visionzip import unzip, visionzip

PROMPT = torch.tensor([[1, 20, IMAGE_TOKEN_INDEX, 30, 40]])


@pytest.fixture
def model(load: Callable[..., Any]) -> LlavaLlamaForCausalLM:
    return load(vision={**CLIP, "image_size": 112})[1]  # 8 x 8 patches and CLS


@pytest.mark.parametrize("dominant, contextual", [(65, 0), (60, 5), (55, 10), (100, 0), (10, 100)], ids=str)
def test_a_budget_of_the_whole_sequence_warns_and_compresses_nothing(
    dominant: int, contextual: int, model: LlavaLlamaForCausalLM
):
    """All 65 tokens, the CLS token included, as they were; and no further warning when the model runs."""
    features = model.get_vision_tower()(pixels(1, edge=112))
    message = f"dominant={dominant} .* contextual={contextual} is {dominant + contextual} tokens, .* has 65: nothing"
    with pytest.warns(UserWarning, match=message) as caught:
        visionzip(model, dominant=dominant, contextual=contextual)
        assert model(PROMPT, images=pixels(1, edge=112)).logits.shape[1] == 4 + 65
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(model.get_vision_tower()(pixels(1, edge=112))[:, 1:], features)


def test_a_layer_that_the_projector_was_not_trained_on_warns(model: LlavaLlamaForCausalLM):
    message = r"reads encoder layer -3, but .* layer -2 \(mm_vision_select_layer\)"
    with pytest.warns(UserWarning, match=message) as caught:
        visionzip(model, dominant=16, contextual=4, layer=-3)
    assert [warning.filename for warning in caught] == [__file__]


WRONG_SETTINGS = [
    ({"dominant": 0}, ValueError, "dominant=0 is below 1"),
    ({"dominant": 16, "contextual": -1}, ValueError, "contextual=-1 is below 0"),
    ({"dominant": 16.0}, TypeError, r"dominant=16\.0 must be an integer"),
    ({"contextual": True}, TypeError, "contextual=True must be an integer"),
    ({"merge": "mean"}, ValueError, "merge='mean' is unknown"),
    ({"layer": 4}, ValueError, r"layer=4 is outside the vision tower's 4 layers \(-4 to 3\)"),
    ({"layer": -5}, ValueError, r"layer=-5 is outside"),
]


@pytest.mark.parametrize("setting, error, message", WRONG_SETTINGS, ids=[str(row[0]) for row in WRONG_SETTINGS])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_wrong_setting_changes_nothing(
    setting: dict[str, Any], error: type[Exception], message: str, zipped: bool, model: LlavaLlamaForCausalLM
):
    if zipped:
        visionzip(model, dominant=8, contextual=2)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        visionzip(model, **setting)
    assert snapshot(model) == before


@pytest.mark.parametrize("function", [visionzip, unzip])
def test_an_unsupported_model(function: Any):
    text_only = LlamaForCausalLM(LlamaConfig(**{**LANGUAGE_MODEL, "num_hidden_layers": 1}))
    message = "does not support LlamaForCausalLM. Supported are .*LlavaMetaForCausalLM.*VisionTower"
    with pytest.raises(TypeError, match=message):
        function(text_only)


@pytest.mark.parametrize("function", [visionzip, unzip])
def test_a_model_without_vision_tower(function: Any):
    with pytest.raises(ValueError, match=r"this LlavaLlamaForCausalLM has no vision tower .* no mm_vision_tower"):
        function(LlavaLlamaForCausalLM(LlavaConfig(**LANGUAGE_MODEL)))


def test_an_unzipped_tower_has_nothing_to_compress(model: LlavaLlamaForCausalLM):
    with pytest.raises(RuntimeError, match="not zipped"):
        model.get_vision_tower().compress(pixels(1, edge=112))

"""The setting."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from visionzip import VisionZipConfig


def test_config_survives_as_dict_json_and_pickle():
    config = VisionZipConfig(dominant=27, contextual=5, layer=-3, merge="average")
    assert config.to_dict() == {"dominant": 27, "contextual": 5, "layer": -3, "merge": "average"}
    assert VisionZipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert {config, dataclasses.replace(config)} == {config}
    assert config.tokens(patches=144) == 32


def test_config_defaults_are_the_papers_64_tokens():
    assert VisionZipConfig.from_dict({}) == VisionZipConfig(dominant=54, contextual=10, layer=-2, merge="released")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VisionZipConfig().dominant = 1


def test_config_names_unknown_keys():
    with pytest.raises(ValueError, match=r"unknown VisionZip settings \['dominent'\]: known are \['contextual', "):
        VisionZipConfig.from_dict({"dominent": 54})


def test_config_layer_must_be_an_integer():
    with pytest.raises(TypeError, match=r"layer=-2\.0 must be an integer, not float"):
        VisionZipConfig(layer=-2.0)


@pytest.mark.parametrize("method", [None, 5, ["scope"]])
def test_config_method_must_be_a_name(method: object):
    with pytest.raises(TypeError, match=r"method=.* must be a method's name, such as 'visionzip', not "):
        VisionZipConfig(keep=4, method=method)


def test_a_share_has_a_most_and_a_least():
    """A photograph of 12 megapixels is 11 844 tokens of Qwen2.5-VL; an icon is 16."""
    config = VisionZipConfig(keep=0.25, max_tokens=1024, min_tokens=16)
    assert [config.tokens(patches) for patches in (11_844, 1024, 100, 40, 16, 9)] == [1024, 256, 25, 16, 16, 9]
    assert VisionZipConfig(keep=0.25).tokens(11_844) == 2961 and VisionZipConfig(keep=0.01).tokens(16) == 1
    assert config.to_dict() == {"layer": -2, "merge": "released", "keep": 0.25, "max_tokens": 1024, "min_tokens": 16}
    assert VisionZipConfig.from_dict(config.to_dict()) == config
    assert str(config) == "keep=0.25, max_tokens=1024, min_tokens=16" and str(VisionZipConfig(keep=0.25)) == "keep=0.25"
    assert {"max_tokens", "min_tokens"}.isdisjoint(VisionZipConfig(keep=0.25).to_dict())


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            {"keep": 64, "max_tokens": 32},
            "max_tokens=32 limits a share of each image's tokens, but the budget is keep=64",
        ),
        ({"min_tokens": 4}, "min_tokens=4 limits a share .* the budget is dominant=54 .* give keep a share"),
        ({"keep": 0.5, "max_tokens": 0}, "max_tokens=0 is below 1"),
        ({"keep": 0.5, "min_tokens": 0}, "min_tokens=0 is below 1"),
        ({"keep": 0.5, "max_tokens": 4, "min_tokens": 5}, "max_tokens=4 is below min_tokens=5"),
    ],
    ids=str,
)
def test_limits_that_make_no_sense(setting: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VisionZipConfig(**setting)
    with pytest.raises(TypeError, match=r"max_tokens=2\.5 must be an integer"):
        VisionZipConfig(keep=0.5, max_tokens=2.5)

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

"""What the vLLM plugin needs to know of a setting; nothing here needs vLLM. The engine itself: test_engine.py."""

from __future__ import annotations

import asyncio
import json
import logging
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from hf_models import EDGE, PATCHES, llava, text_config, vision_config
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaNextConfig, PixtralVisionConfig

from visionzip import VisionZipConfig
from visionzip.attention import read_attention
from visionzip.encoder import compress_images, has_cls_token, hidden_states
from visionzip.methods import METHODS
from visionzip.serving import MODELS, register
from visionzip.serving.prompts import SpecialTokens
from visionzip.serving.setting import (
    cache_key,
    check_parallel,
    served_setting,
    tile_tokens,
    tiles_at_once,
    warn_untested,
)


def config(vision: Any = None, is_next: bool = False, **values: Any) -> Any:
    """A model's config, as vLLM has it after ``--hf-overrides``."""
    pinpoints = {"image_grid_pinpoints": [[56, 112]]} if is_next else {}
    kind = LlavaNextConfig if is_next else LlavaConfig
    return kind(vision_config=vision or vision_config(), text_config=text_config(), **pinpoints, **values)


def test_the_plugin_is_found_by_its_entry_point():
    (point,) = entry_points(group="vllm.general_plugins", name="visionzip")
    assert point.load() is register
    families = ("Llava", "LlavaNext", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
    assert list(MODELS) == [f"{family}ForConditionalGeneration" for family in families]


def test_a_setting_is_read_from_the_config():
    """As a zipped checkpoint stores it, or as ``--hf-overrides`` gives it; without one a model stays as it is."""
    assert served_setting(config()) is None
    assert served_setting(config(visionzip=None)) is None
    assert served_setting(config(visionzip=VisionZipConfig(4, 2).to_dict())) == VisionZipConfig(4, 2)
    assert served_setting(config(visionzip={"keep": 0.5, "method": "scope"})).method == "scope"
    assert served_setting(config(visionzip={"keep": 6}, vision_feature_layer=-3)).layer == -3
    assert served_setting(config(visionzip={"keep": 6}, vision_feature_layer=2)).layer == 1


@pytest.mark.parametrize("siglip", [False, True])
def test_the_number_of_placeholders_is_that_of_the_tokens(siglip: bool):
    """Of every method, from shapes alone."""
    model = llava(siglip)
    pixels = torch.randn(2, 3, EDGE, EDGE)
    for method in METHODS:
        for keep in (4, PATCHES + 1):  # the latter leaves all there are
            setting = VisionZipConfig(keep=keep, method=method, positions="consecutive", size_bias=False)
            with torch.no_grad():
                found = compress_images(model.model.vision_tower, pixels, setting, model.model.multi_modal_projector)
            assert tile_tokens(setting, model.config.vision_config) == found.tokens.shape[1], method


def test_the_setting_is_in_the_cache_key():
    """Settings that choose differently have different ones; a default is the same whether said or not."""
    settings = [VisionZipConfig(4, 2), VisionZipConfig(5, 1), VisionZipConfig(4, 2, merge="average")]
    settings += [VisionZipConfig(keep=6, method=name) for name in METHODS]
    assert len({cache_key(setting) for setting in settings}) == len(settings)
    assert cache_key(VisionZipConfig(4, 2)) == cache_key(VisionZipConfig(4, 2, positions="consecutive"))


def test_the_encoder_sees_no_more_at_once_than_its_budget():
    """577 tokens of an image are in its memory, though 64 are left."""
    assert tiles_at_once(8192, 577) == 14
    assert tiles_at_once(128, 577) == 1


@pytest.mark.parametrize(
    "values, said",
    [
        (
            {"keep": 6, "positions": "original"},
            r'positions="original" .*add "positions": "consecutive"',
        ),
        ({"keep": 6, "size_bias": True}, r'size_bias=true .*add "positions": "consecutive", "size_bias": false'),
        ({"keep": 6, "layer": -1}, r"layer=-1 .*vision_feature_layer=-2"),
        ({"keep": 6, "layer": -8}, r"layer=-8 "),
        ({"keep": 6, "method": "scop"}, "did you mean 'scope'"),
        ({"keeps": 6}, "unknown VisionZip settings"),
        ({"keep": 0}, "keep=0 is below 1"),
        ({"keep": 6, "dominant": 3}, "keep=6 beside dominant: give one or the other"),
        ({"keep": 7, "method": "pool"}, "7"),
        (64, r'give a dict, such as \{"keep": 64\}'),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(values: Any, said: str):
    with pytest.raises(ValueError, match=said):
        served_setting(config(visionzip=values))


def test_models_that_cannot_be_zipped_are_refused():
    with pytest.raises(ValueError, match="CLIP and SigLIP encoders, not this model's pixtral"):
        served_setting(config(PixtralVisionConfig(num_hidden_layers=2), visionzip={"keep": 6}))
    with pytest.raises(ValueError, match=r"hidden states \[-2, -1\]"):
        served_setting(config(visionzip={"keep": 6}, vision_feature_layer=[-2, -1]))
    with pytest.raises(ValueError, match="needs to know which patch a token is"):
        served_setting(config(is_next=True, visionzip={"keep": 4, "method": "pool"}))


def test_a_split_tower_is_refused():
    """Unless nothing is read of its heads."""
    check_parallel(VisionZipConfig(4, 2), 1, "weights")
    check_parallel(VisionZipConfig(4, 2), 2, "data")
    check_parallel(VisionZipConfig(keep=4, method="uniform"), 2, "weights")
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 .*--mm-encoder-tp-mode data"):
        check_parallel(VisionZipConfig(4, 2), 2, "weights")


def test_an_untested_pair_is_said_in_the_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        warn_untested(vllm="0.32.0", transformers="5.19.0")
        assert not caplog.records
        warn_untested(vllm="0.33.1", transformers="5.23.0")
    assert "tested with vllm 0.32.x and transformers 5.19.x, this is vllm 0.33.1 and transformers 5.23.0" in caplog.text


@pytest.mark.parametrize(
    "path, body, asks",
    [
        ("/v1/chat/completions", {"model": "llava"}, True),
        ("/v1/chat/completions", {"model": "llava", "add_special_tokens": False}, False),
        ("/v1/completions", {"model": "llava"}, None),
    ],
)
def test_chat_requests_ask_for_the_first_token(path: str, body: dict[str, Any], asks: bool | None):
    """Unless they say that they do not; the body comes in pieces."""
    content, seen = json.dumps(body).encode(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pieces = [await receive() for _ in range(2)]
        seen.extend([scope["headers"], b"".join(piece["body"] for piece in pieces)])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    parts = [content[:5], content[5:]]
    scope = {"type": "http", "path": path, "headers": [(b"content-length", str(len(content)).encode())]}
    asyncio.run(SpecialTokens(app)(scope, receive, None))
    ((_, length),), received = seen
    assert int(length) == len(received)
    expected = body if asks is None else {"add_special_tokens": asks, **body}
    assert json.loads(received) == expected


class Fused(nn.Module):
    """An attention layer as vLLM's: one projection for queries, keys and values, which returns a tuple."""

    def __init__(self, separate: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.scale, self.inner = separate.num_heads, separate.scale, separate
        projections = [separate.q_proj, separate.k_proj, separate.v_proj]
        weight, bias = (torch.cat([getattr(each, name) for each in projections]) for name in ("weight", "bias"))
        self.qkv_proj = Linear(weight, bias)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        self.qkv_proj(hidden_states)
        return self.inner(hidden_states, **kwargs)


class Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(states, self.weight, self.bias), None


@pytest.mark.parametrize("siglip", [False, True])
@torch.no_grad()
def test_a_fused_projection_is_read_like_separate_ones(siglip: bool):
    tower, pixels = llava(siglip).model.vision_tower, torch.randn(2, 3, EDGE, EDGE)
    layer = tower.encoder.layers[-2]
    with read_attention(layer.self_attn) as reader:
        hidden_states(tower, pixels, len(tower.encoder.layers) - 1)
    expected = reader.result()
    layer.self_attn = Fused(layer.self_attn)
    with read_attention(layer.self_attn) as reader:
        hidden_states(tower, pixels, len(tower.encoder.layers) - 1)
    assert expected.queries.shape[2] == PATCHES + has_cls_token(tower)
    for name in ("queries", "keys"):
        torch.testing.assert_close(getattr(reader.result(), name), getattr(expected, name))

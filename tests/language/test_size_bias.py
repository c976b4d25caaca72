"""The size bias inside a language model: a token of size s is attended to as if it were there s times."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    StaticCache,
)

from slow_llama import slow_sized
from visionzip.language.size_bias import attach_size_bias

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}
BACKBONES = {
    "llama": lambda **options: LlamaModel(LlamaConfig(**SIZES, **options)),
    "mistral": lambda **options: MistralModel(MistralConfig(**SIZES, **{"sliding_window": 6} | options)),
    "qwen2": lambda **options: Qwen2Model(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1, **options)
    ),
}


def build(name: str = "llama", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    backbone = BACKBONES[name](**options).eval()
    attach_size_bias(backbone)
    return backbone


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    yield build(request.param)


@pytest.fixture
def prompt() -> dict[str, Tensor]:
    """Two prompts of nine tokens, the third to fifth of which stand for several patches each."""
    torch.manual_seed(1)
    sizes = torch.ones(2, 9)
    sizes[:, 2:5] = torch.tensor([[4.0, 1.0, 9.0], [2.0, 7.0, 3.0]])
    return {"inputs_embeds": torch.randn(2, 9, 32), "token_sizes": sizes}


def hidden(backbone: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return backbone(**arguments).last_hidden_state


@pytest.mark.parametrize(("name", "window"), [("llama", 99), ("mistral", 6)])
def test_equals_the_slow_reference(name: str, window: int, prompt: dict[str, Tensor]):
    backbone, places = build(name), torch.tensor([0, 1, 2, 5, 9, 12, 13, 14, 15])
    distance = torch.arange(9)[:, None] - torch.arange(9)
    visible = (distance >= 0) & (distance < window)
    mask = torch.ones(2, 9, dtype=torch.long)  # without one, a jump of positions would begin another prompt
    result = hidden(backbone, **prompt, position_ids=places.expand(2, -1), attention_mask=mask)
    for row in range(2):
        expected = slow_sized(backbone, prompt["inputs_embeds"][row], prompt["token_sizes"][row], places, visible)
        torch.testing.assert_close(result[row], expected, atol=2e-5, rtol=1e-4)


def test_a_token_of_size_two_is_one_that_is_there_twice(prompt: dict[str, Tensor]):
    backbone, sizes = build(), torch.ones(2, 9)
    sizes[:, 3] = 2
    once = hidden(backbone, **prompt | {"token_sizes": sizes})
    doubled = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 7, 8])  # at the same position, seen by all behind it
    mask = torch.ones(10, 10).tril().bool()
    mask[3, 4] = True  # and by each other
    twice = hidden(
        backbone,
        inputs_embeds=prompt["inputs_embeds"][:, doubled],
        position_ids=doubled[None],
        attention_mask=mask.expand(2, 1, -1, -1),
    )
    torch.testing.assert_close(once, twice[:, torch.arange(10) != 4], atol=1e-5, rtol=1e-4)


def test_without_sizes_nothing_changes(backbone: nn.Module, prompt: dict[str, Tensor]):
    bare = copy.deepcopy(backbone)
    bare._forward_pre_hooks.clear()
    embeds = prompt["inputs_embeds"]
    assert torch.equal(hidden(backbone, inputs_embeds=embeds), hidden(bare, inputs_embeds=embeds))
    ones = hidden(backbone, inputs_embeds=embeds, token_sizes=torch.ones(2, 9))
    torch.testing.assert_close(ones, hidden(bare, inputs_embeds=embeds), atol=1e-5, rtol=1e-4)


def test_sdpa_is_eager(prompt: dict[str, Tensor]):
    for name in BACKBONES:
        eager = build(name, attn_implementation="eager")
        torch.testing.assert_close(hidden(build(name), **prompt), hidden(eager, **prompt), atol=1e-5, rtol=1e-4)


def test_decoding_and_later_turns_equal_recomputing(backbone: nn.Module, prompt: dict[str, Tensor]):
    """Token by token, then a text of three, then a second image: all as if the whole had been given at once."""
    embeds = torch.cat([prompt["inputs_embeds"], torch.randn(2, 9, 32)], dim=1)
    sizes = torch.cat([prompt["token_sizes"], torch.ones(2, 9)], dim=1)
    sizes[:, 14:16] = 5
    expected = hidden(backbone, inputs_embeds=embeds, token_sizes=sizes)
    cache, found = DynamicCache(config=backbone.config), []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 14), (14, 17), (17, 18)):
        own = {"token_sizes": sizes[:, start:end]} if start in (0, 14) else {}
        found.append(hidden(backbone, inputs_embeds=embeds[:, start:end], past_key_values=cache, **own))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-4)


def test_the_forwards_own_cache_has_the_sizes(prompt: dict[str, Tensor]):
    backbone, more = build(), torch.randn(2, 1, 32)
    with torch.no_grad():
        cache = backbone(**prompt, use_cache=True).past_key_values
    after = hidden(backbone, inputs_embeds=more, past_key_values=copy.deepcopy(cache))
    plain = {"inputs_embeds": torch.cat([prompt["inputs_embeds"], more], dim=1)}
    sizes = torch.cat([prompt["token_sizes"], torch.ones(2, 1)], dim=1)
    torch.testing.assert_close(after[:, -1], hidden(backbone, **plain, token_sizes=sizes)[:, -1])
    assert backbone(**prompt, use_cache=False).past_key_values is None


def test_a_cut_cache_forgets_the_sizes_of_what_was_cut(prompt: dict[str, Tensor]):
    backbone, cache, embeds = build(), DynamicCache(), prompt["inputs_embeds"]
    hidden(backbone, **prompt, past_key_values=cache)
    cache.crop(-6)  # the first image token is left
    sizes = torch.cat([prompt["token_sizes"][:, :3], torch.ones(2, 6)], dim=1)
    again = hidden(backbone, inputs_embeds=embeds[:, 3:], past_key_values=cache)
    expected = hidden(backbone, inputs_embeds=embeds, token_sizes=sizes)
    torch.testing.assert_close(again, expected[:, 3:], atol=1e-5, rtol=1e-4)
    cache.reset()
    text = hidden(backbone, inputs_embeds=embeds, past_key_values=cache)
    torch.testing.assert_close(text, hidden(backbone, inputs_embeds=embeds), atol=1e-5, rtol=1e-4)


def test_left_padding_and_repeated_rows(backbone: nn.Module, prompt: dict[str, Tensor]):
    """A shorter prompt padded on the left, and each prompt three times over, as beams have them."""
    embeds, sizes = prompt["inputs_embeds"].clone(), prompt["token_sizes"].clone()
    short = {"inputs_embeds": embeds[1:, 2:].clone(), "token_sizes": sizes[1:, 2:].clone()}
    embeds[1, :2], sizes[1, :2] = 0, 1
    mask = torch.tensor([[1] * 9, [0] * 2 + [1] * 7])
    cache = DynamicCache(config=backbone.config)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"attention_mask": mask, "position_ids": places, "past_key_values": cache}
    result = hidden(backbone, inputs_embeds=embeds, token_sizes=sizes, **padded)
    torch.testing.assert_close(result[1:, 2:], hidden(backbone, **short), atol=1e-5, rtol=1e-4)
    cache.batch_repeat_interleave(3)
    more = torch.randn(6, 1, 32)
    step = {"attention_mask": torch.cat([mask, mask.new_ones(2, 1)], 1).repeat_interleave(3, 0)}
    step["position_ids"] = (places[:, -1:] + 1).repeat_interleave(3, 0)
    after = hidden(backbone, inputs_embeds=more, past_key_values=cache, **step)
    for row in range(6):
        whole = torch.cat([(prompt["inputs_embeds"][:1], short["inputs_embeds"])[row // 3], more[row : row + 1]], dim=1)
        ones = torch.ones(1, whole.shape[1])
        ones[:, :-1] = (prompt["token_sizes"][:1], short["token_sizes"])[row // 3]
        expected = hidden(backbone, inputs_embeds=whole, token_sizes=ones)
        torch.testing.assert_close(after[row], expected[0, -1:], atol=1e-5, rtol=1e-4)


def test_a_static_cache(prompt: dict[str, Tensor]):
    backbone, more = build(), torch.randn(2, 1, 32)
    found = []
    for cache in (DynamicCache(), StaticCache(config=backbone.config, max_cache_len=16)):
        hidden(backbone, **prompt, past_key_values=cache)
        found.append(hidden(backbone, inputs_embeds=more, past_key_values=cache))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_a_static_cache_that_was_emptied(prompt: dict[str, Tensor]):
    """Filled anew token by token, beyond where the image was: as if it had never been there."""
    backbone, embeds = build(), torch.randn(2, 12, 32)
    found = []
    for first in (prompt, None):
        cache = StaticCache(config=backbone.config, max_cache_len=16)
        if first is not None:
            hidden(backbone, **first, past_key_values=cache)
            cache.reset()
        found.append(
            [hidden(backbone, inputs_embeds=embeds[:, at : at + 1], past_key_values=cache) for at in range(12)]
        )
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_embeddings(prompt: dict[str, Tensor]):
    backbone = build().train()
    backbone.activation_checkpointing_enable()
    embeds = prompt["inputs_embeds"].requires_grad_()
    backbone(inputs_embeds=embeds, token_sizes=prompt["token_sizes"]).last_hidden_state.square().sum().backward()
    assert (embeds.grad != 0).any(dim=-1).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone(inputs_embeds=embeds, token_sizes=prompt["token_sizes"]).last_hidden_state.isfinite().all()


def test_refused(prompt: dict[str, Tensor]):
    backbone = build()
    with pytest.raises(ValueError, match=r"token_sizes has shape \(2, 8\).*\(2, 9\)"):
        backbone(inputs_embeds=prompt["inputs_embeds"], token_sizes=torch.ones(2, 8))
    cache = DynamicCache()
    hidden(backbone, **prompt, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 prompts with images, but 3 rows follow"):
        backbone(inputs_embeds=torch.randn(3, 1, 32), past_key_values=cache)
    backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes none: load the model with"):
        attach_size_bias(backbone)
    with pytest.raises(ValueError, match="'flash_attention_2' takes none: load the model with"):
        backbone(**prompt)

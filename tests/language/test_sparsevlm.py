"""SparseVLM's parts: raters, recycling, published numbers. test_fastv.py has the slow reference that it equals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import CLIP
from eval.running.methods import Run, attach
from slow_llama import slow_clusters, slow_raters
from visionzip.language import sparsevlm
from visionzip.language.sparsevlm import COUNTS, num_recycled, recycled, single_layer_keep, text_raters


def random_prompt(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, visual mask and mask of real tokens: padding, text, an image of seed + 1 tokens, text."""
    embeds = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed))
    visual, real = torch.zeros(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)
    visual[6 : 7 + seed] = True
    real[:3] = False
    return embeds, visual, real


@pytest.mark.parametrize("seed", range(6))
def test_raters(seed: int):
    embeds, visual, real = random_prompt(seed)
    raters = text_raters(embeds, visual, real)
    assert set(raters.nonzero().flatten().tolist()) == slow_raters(embeds, visual)
    assert 0 < raters.sum() < (30 - 7 - seed) and raters[: 7 + seed].sum() == 0


def test_raters_of_odd_prompts():
    embeds, visual, real = random_prompt(3)
    assert not text_raters(embeds, visual & False, real).any()
    same = embeds.clone()
    same[10:] = 1.0
    assert text_raters(same, visual, real).nonzero().flatten().tolist() == list(range(10, 30))
    real[11:] = False  # padding on the right
    assert text_raters(embeds, visual, real).nonzero().flatten().tolist() == [10]
    real[10] = False
    with pytest.raises(ValueError, match="text after the last image"):
        text_raters(embeds, visual, real)


@pytest.mark.parametrize("number", [1, 2, 9, 34, 100, 300])
def test_recycling_is_density_peak_clustering(number: int):
    generator = torch.Generator().manual_seed(number)
    tokens, scores = torch.randn(number, 6, generator=generator), torch.rand(number, generator=generator)
    better = sorted(sorted(range(number), key=lambda i: -scores[i].item())[: int(0.3 * number) + 1])
    expected = slow_clusters([tokens[i] for i in better], num_recycled(number))
    merged = recycled(tokens, scores)
    torch.testing.assert_close(merged, torch.stack(expected))
    assert len(merged) == num_recycled(number) and torch.equal(merged, recycled(tokens, scores))


def test_recycling_of_equal_tokens():
    """Ties have an order: no noise, no empty cluster, whatever the type."""
    tokens = torch.ones(100, 6, dtype=torch.bfloat16)
    assert torch.equal(recycled(tokens, torch.zeros(100)), tokens[: num_recycled(100)])
    mean = recycled(torch.arange(20.0)[:, None], torch.arange(20.0))
    torch.testing.assert_close(mean, torch.tensor([[16.0]]))  # of the better 30 % and one: 13 to 19


def test_published_numbers():
    """Of LLaVA-1.5-7B: the average over its layers, and what the single layer keeps before recycling."""
    averages = [(2 * 576 + 4 * a + 10 * b + 16 * c) / 32 for a, b, c in COUNTS.values()]
    assert [int(average) for average in averages] == [191, 126, 93, 62]
    assert [single_layer_keep(tokens, 576) for tokens in (192, 128, 64)] == [180, 114, 48]
    assert [round(single_layer_keep(tokens, 2880) / 2880, 3) for tokens in (640, 320, 160)] == [0.198, 0.083, 0.026]
    for tokens in range(num_recycled(144), 145):
        keep = single_layer_keep(tokens, 144)
        assert tokens - 1 <= keep + num_recycled(144 - keep) <= tokens
    with pytest.raises(ValueError, match="cannot make 3 of 144"):
        single_layer_keep(3, 144)


def seen(model: Any) -> list[int]:
    """Visual tokens that each layer sees of a prompt with 14 tokens of text."""
    prompt = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0))
    visual = (torch.arange(30) >= 4) & (torch.arange(30) < 20)
    with torch.no_grad():
        cache = model(inputs_embeds=prompt, visual_mask=visual[None], use_cache=True).past_key_values
    return [cache.get_seq_length(layer) - 14 for layer in range(model.config.num_hidden_layers)]


def test_budgets_by_name(load):
    """Of 16 patches, in 32 layers: 192 of 576 is 5 1/3, and 36 is 1; the published layers."""
    deep, shallow = (load(num_hidden_layers=layers)[1] for layers in (32, 4))
    attach(deep, Run("fastv", 4))
    assert seen(deep) == [16] * 2 + [4] * 30
    attach(deep, Run("fastv-average", 4))  # (2 * 16 + 30 n) / 32 = 4: n = 3.2
    assert seen(deep) == [16] * 2 + [3] * 30
    attach(deep, Run("sparsevlm", 4))
    assert seen(deep) == [16] * 3 + [4] * 29
    attach(shallow, Run("fastv", 4))
    assert seen(shallow) == [16] + [4] * 3
    attach(shallow, Run("sparsevlm", 4))
    assert seen(shallow) == [16] + [4] * 3
    with pytest.raises(ValueError, match="published for 32 layers"):
        attach(shallow, Run("sparsevlm-average", 4))
    with pytest.raises(ValueError, match="lies between 4 "):
        attach(shallow, Run("fastv-average", 3))


def test_published_layers(load):
    """576 patches: the released table in the layers that it is for, with recycled tokens on top."""
    model = load(num_hidden_layers=32, vision={**CLIP, "image_size": 336})[1]
    attach(model, Run("sparsevlm-average", 192))
    prompt = torch.randn(1, 600, 32, generator=torch.Generator().manual_seed(0))
    visual = (torch.arange(600) >= 4) & (torch.arange(600) < 580)
    with torch.no_grad():
        cache = model(inputs_embeds=prompt, visual_mask=visual[None], use_cache=True).past_key_values
    found = [cache.get_seq_length(layer) - 24 for layer in range(32)]
    first = 300 + num_recycled(276)
    second = 200 + num_recycled(first - 200)
    third = 110 + num_recycled(second - 110)
    assert found == [576] * 3 + [first] * 4 + [second] * 9 + [third] * 16


def test_without_recycling(load):
    model = sparsevlm(load(num_hidden_layers=4)[1], (8, 0.25), (0, 1), recycle=False)
    assert seen(model) == [16, 8, 4, 4]


def test_errors(load):
    model = load(num_hidden_layers=4)[1]
    for keep, layers in (((3, 2), (1,)), ((3, 2), (1, 0)), ((3, 3), (1, 1))):
        with pytest.raises(ValueError, match="give ascending layers"):
            sparsevlm(model, keep, layers)
    with pytest.raises(ValueError, match="after layer 6 of 4"):
        sparsevlm(model, (3, 2), (1, 6))

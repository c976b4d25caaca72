"""FLOPs: the paper's formula with the paper's models, and the exact count against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from visionzip import visionzip
from visionzip.flops import (
    clip_module_flops,
    compression_flops,
    llama_module_flops,
    llama_prefill_flops,
    prefill_flops,
    projector_flops,
)


@pytest.mark.parametrize(
    ("shape", "tera"),
    [
        (
            (32, 4096, 11008),
            {64: 0.3232, 128: 0.6485, 160: 0.8120, 192: 0.9760, 320: 1.6375, 576: 2.9861, 640: 3.3286, 2880: 16.6698},
        ),  # 7B
        ((40, 5120, 13824), {64: 0.6325, 160: 1.5875, 320: 3.1961, 576: 5.8133, 640: 6.4760, 2880: 31.7844}),  # 13B
    ],
)
def test_the_papers_formula(shape: tuple[int, int, int], tera: dict[int, float]):
    for tokens, expected in tera.items():
        assert prefill_flops(tokens, *shape) / 1e12 == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral", "llava_qwen"])
def test_the_exact_count_is_torchs(load, model_type: str):
    """Grouped keys and values (4 heads, 2 of keys), and a head width that does not follow from the model's."""
    overrides = {} if model_type == "llava_qwen" else {"head_dim": 16}
    _, model, _, _ = load(model_type=model_type, **overrides)
    model.set_attn_implementation("eager")  # fused kernels are not all known to the counter
    for tokens in (1, 37):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(inputs_embeds=torch.randn(1, tokens, 32), logits_to_keep=1)
        assert counter.get_total_flops() == llama_prefill_flops(model.config, tokens)


def test_fewer_visual_tokens_cost_in_proportion_at_least():
    config = LlamaConfig()  # 7B
    whole, zipped = (llama_prefill_flops(config, 60 + visual) for visual in (576, 64))
    assert whole / zipped > 636 / 124


def by_module(counter: FlopCounterMode, prefix: str, name: str, layers: int) -> int:
    """What torch counted in a module of that name, in all layers."""
    counts = counter.get_flop_counts()
    return sum(sum(counts[f"{prefix}.{layer}.{name}"].values()) for layer in range(layers))


def test_each_module_of_the_language_model(load):
    """The count of a module is torch's, and what ``self_attn`` has beyond its projections are the two products."""
    _, model, _, _ = load(model_type="llava_llama")
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 29, 32), logits_to_keep=1)
    expected = llama_module_flops(model.config, [29, 29])
    own = expected.pop("self_attn")
    assert sum(counter.get_flop_counts()["LlavaLlamaForCausalLM.lm_head"].values()) == expected.pop("lm_head")
    prefix = "LlavaLlamaForCausalLM.model.layers"
    assert {name: by_module(counter, prefix, name, 2) for name in expected} == expected
    projections = sum(count for name, count in expected.items() if name.startswith("self_attn."))
    assert by_module(counter, prefix, "self_attn", 2) == projections + own


def test_layers_of_different_lengths():
    """A method that prunes before layer 2 of 4: two layers of 100 tokens, two of 10."""
    config = LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    pruned = llama_module_flops(config, [100, 100, 10, 10])
    whole, short = (llama_module_flops(config, [length] * 4) for length in (100, 10))
    assert all(pruned[name] == (whole[name] + short[name]) / 2 for name in pruned)
    with pytest.raises(ValueError, match="3 lengths for 4 layers"):
        llama_module_flops(config, [1, 1, 1])


@pytest.mark.parametrize(("dominant", "contextual"), [(None, None), (6, 3), (6, 0), (20, 5)])
@pytest.mark.filterwarnings("ignore:dominant=20")
def test_the_vision_side(load, dominant: int | None, contextual: int | None):
    """Tower, compression and projector of three images; (20, 5) compresses nothing of 17 tokens."""
    _, model, _, _ = load()
    model.set_attn_implementation("eager")
    tower = model.get_vision_tower()
    expected = clip_module_flops(tower.config, images=3, layers=3)
    tokens = 16
    if dominant is not None:
        visionzip(model, dominant, contextual)
        expected |= compression_flops(tower.config, 3, dominant, contextual)
        tokens = min(dominant + contextual, 17)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_images(torch.randn(3, 3, 56, 56))
    total = sum(expected.values()) + projector_flops(32, 32, 3 * tokens)
    assert counter.get_total_flops() == total

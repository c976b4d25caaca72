"""FLOPs: the paper's formula with the paper's models, and the exact count against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from visionzip.flops import llama_prefill_flops, prefill_flops


@pytest.mark.parametrize(
    ("shape", "tera"),
    [
        ((32, 4096, 11008), {64: 0.3232, 128: 0.6485, 192: 0.9760, 576: 2.9861, 2880: 16.6698}),  # 7B
        ((40, 5120, 13824), {64: 0.6325, 160: 1.5875, 576: 5.8133, 2880: 31.7844}),  # 13B
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

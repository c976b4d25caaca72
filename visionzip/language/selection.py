"""Choose which visual tokens a language model keeps, by the attention that they receive."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

Keep = int | float
"""How many visual tokens of a prompt to keep: a number, or a fraction of them."""


def keep_top(scores: Tensor, candidates: Tensor, number: int) -> Tensor:
    """Choose the candidates of highest score; equal scores resolve to the lower index.

    Args:
        scores: (L,), a score of each token.
        candidates: (L,) bool, true for tokens that may be chosen.
        number: how many to choose; if there are fewer candidates, all are chosen.

    Returns:
        (L,) bool, true for the chosen tokens.
    """
    order = scores.argsort(descending=True, stable=True)
    return torch.zeros_like(candidates).scatter(0, order[candidates[order]][:number], True)


def number_to_keep(keep: Keep, visual: int) -> int:
    """Turn a fraction of a prompt's visual tokens into a number, rounding halves up; a number is returned itself."""
    return int(keep * visual + 0.5) if isinstance(keep, float) else keep


def attention_received(
    layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], queries: Tensor, real: Tensor
) -> Tensor:
    """Compute the attention that every token receives from the query tokens in one decoder layer.

    The result is the mean over heads and query tokens. Only their rows of the attention matrix are computed.

    Args:
        layer: a decoder layer of a Llama, Mistral or Qwen2 model.
        hidden: (B, S, D), the layer's input.
        position_embeddings: the cosines and sines of the rotation, each (B or 1, S, Dh).
        queries: (B, S) bool, true for the query tokens.
        real: (B, S) bool, false for padding.

    Returns:
        (B, S) float32; a prompt without query tokens has 0 everywhere.
    """
    attention = layer.self_attn
    device = attention.k_proj.weight.device  # a model may be spread over several devices
    hidden = layer.input_layernorm(hidden.to(device))
    cos, sin = (each.to(device).expand(len(hidden), -1, -1) for each in position_embeddings)
    keys = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    keys = _rotated(keys, cos[:, :, None], sin[:, :, None])
    places = torch.arange(hidden.shape[1], device=device)
    received = []
    for row in range(len(hidden)):  # prompts differ in which tokens and how many are queries
        own = queries[row].to(device).nonzero().flatten()
        wanted = attention.q_proj(hidden[row, own]).unflatten(-1, (-1, attention.head_dim))
        wanted = _rotated(wanted, cos[row, own, None], sin[row, own, None]).transpose(0, 1)  # (H, R, Dh)
        its_keys = keys[row].transpose(0, 1).repeat_interleave(attention.num_key_value_groups, dim=0)
        seen = real[row].to(device) & (places <= own[:, None])
        with torch.autocast(device.type, enabled=False):
            logits = wanted.float() @ its_keys.float().transpose(1, 2) * attention.scaling
            weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        received.append(weights.mean(dim=0).sum(dim=0) / max(1, len(own)))
    return torch.stack(received)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings (…, Dh)."""
    return states * cos + rotate_half(states) * sin

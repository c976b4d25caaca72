"""What a prompt costs the language model, in operations."""

from __future__ import annotations

from typing import Any


def prefill_flops(tokens: int, layers: int, hidden_size: int, intermediate_size: int) -> int:
    """The paper's estimate of a prefill: T x (4 n d^2 + 2 n^2 d + 2 n d m).

    It counts a multiplication with its addition as one, and two of SwiGLU's three products; :func:`llama_prefill_flops`
    counts what is really done.

    Args:
        tokens: n, the prompt's length with its visual tokens.
        layers: T.
        hidden_size: d.
        intermediate_size: m, width of the feed-forward network.

    Source: arXiv 2412.04467, Preliminary.
    """
    return layers * (
        4 * tokens * hidden_size**2 + 2 * tokens**2 * hidden_size + 2 * tokens * hidden_size * intermediate_size
    )


def llama_prefill_flops(config: Any, tokens: int) -> int:
    """Floating-point operations of a prefill's matrix products (a multiplication and its addition are two).

    Projections with grouped keys and values, the two products of attention over the whole square (fused kernels may
    skip its upper half), the three of SwiGLU, and the logits of the last position, as ``generate`` computes them.

    Args:
        config: of a Llama, Mistral or Qwen2 model.
        tokens: the prompt's length with its visual tokens.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * per_head, config.num_key_value_heads * per_head
    projections = tokens * width * (2 * queries + 2 * keys)
    attention = 2 * tokens**2 * queries
    feed_forward = 3 * tokens * width * config.intermediate_size
    layers = config.num_hidden_layers * (projections + attention + feed_forward)
    return 2 * (layers + width * config.vocab_size)

"""Count what images and prompts cost in operations: by the paper's formula, and exactly, module by module.

The exact counts are those of matrix products, where a multiplication and its addition are two operations.
``torch.utils.flop_counter`` counts alike, and tests/measuring/test_flops.py compares the two module by module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prefill_flops(tokens: int, layers: int, hidden_size: int, intermediate_size: int) -> int:
    """Estimate the operations of a prefill by the paper's formula, T x (4 n d^2 + 2 n^2 d + 2 n d m).

    The formula counts a multiplication and its addition as one operation, and only two of SwiGLU's three products.
    :func:`llama_prefill_flops` counts what is really computed.

    Args:
        tokens: n, the prompt's length with its visual tokens.
        layers: T, the layers of the language model.
        hidden_size: d, its hidden size.
        intermediate_size: m, the width of its feed-forward network.

    Source: arXiv 2412.04467, Preliminary.
    """
    return layers * (
        4 * tokens * hidden_size**2 + 2 * tokens**2 * hidden_size + 2 * tokens * hidden_size * intermediate_size
    )


def llama_prefill_flops(config: Any, tokens: int) -> int:
    """Count the operations of a prefill in which every layer sees all tokens: the sum of :func:`llama_module_flops`.

    Args:
        config: the config of a Llama, Mistral or Qwen2 model.
        tokens: the prompt's length with its visual tokens.
    """
    return sum(llama_module_flops(config, [tokens] * config.num_hidden_layers).values())


def llama_module_flops(config: Any, lengths: Sequence[int]) -> dict[str, int]:
    """Count the operations of one prompt's prefill by module, summed over all layers.

    The count has the projections, with grouped keys and values; the two products of attention over the whole square,
    though fused kernels may skip its upper half; the three products of SwiGLU; and the logits of the last position,
    which is all that ``generate`` computes.

    Args:
        config: the config of a Llama, Mistral or Qwen2 model.
        lengths: how many tokens each layer sees; they differ if a method prunes between layers.

    Returns:
        The operations by the module's name inside a layer. The two products of attention belong to no module and have
        the name ``self_attn``.

    Raises:
        ValueError: there is not one length for each layer.
    """
    if len(lengths) != config.num_hidden_layers:
        raise ValueError(f"{len(lengths)} lengths for {config.num_hidden_layers} layers: give one for each")
    width, heads = config.hidden_size, config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * per_head, config.num_key_value_heads * per_head
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    flops = {f"self_attn.{name}": 2 * tokens * width * out for name, out in widths.items()}
    flops["self_attn"] = 4 * squares * queries
    flops |= {
        f"mlp.{name}": 2 * tokens * width * config.intermediate_size for name in ("gate_proj", "up_proj", "down_proj")
    }
    return {**flops, "lm_head": 2 * width * config.vocab_size}


def clip_module_flops(config: Any, images: int, layers: int) -> dict[str, int]:
    """Count the operations of a CLIP tower by module, summed over the layers that run.

    Args:
        config: the config of a CLIP vision model.
        images: how many images or tiles there are.
        layers: how many layers run (LLaVA: all but the last).

    Returns:
        The operations by the module's name, for modules of a layer inside that layer. ``self_attn`` has the two
        products of attention, as in :func:`llama_module_flops`.
    """
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    length = patches + 1
    linear = 2 * images * layers * length * width
    flops = {"embeddings.patch_embedding": 2 * images * patches * config.num_channels * config.patch_size**2 * width}
    flops |= {f"self_attn.{name}": linear * width for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    flops["self_attn"] = 4 * images * layers * length**2 * width
    return flops | {f"mlp.{name}": linear * config.intermediate_size for name in ("fc1", "fc2")}


def compression_flops(config: Any, images: int, dominant: int, contextual: int) -> dict[str, int]:
    """Count the operations that VisionZip adds to a CLIP tower.

    Args:
        config: the config of the CLIP vision model.
        images: how many images or tiles there are.
        dominant: K, the dominant tokens, CLS included.
        contextual: M, the contextual tokens.

    Returns:
        The operations of ``score``, the CLS token's row of attention; ``similarity``, that of the remaining tokens to
        the targets; and ``merge``, the weighted sums.
    """
    length = (config.image_size // config.patch_size) ** 2 + 1
    if dominant + contextual >= length:  # nothing is merged, but the scores are computed all the same
        contextual = 0
    per_head = config.hidden_size // config.num_attention_heads
    return {
        "score": 2 * images * length * config.hidden_size,
        "similarity": 2 * images * (length - dominant) * contextual * per_head,
        "merge": 2 * images * contextual * length * config.hidden_size,
    }


def projector_flops(vision_size: int, hidden_size: int, tokens: int) -> int:
    """Count the operations of LLaVA's projector (``mlp2x_gelu``) on a number of visual tokens."""
    return 2 * tokens * hidden_size * (vision_size + hidden_size)

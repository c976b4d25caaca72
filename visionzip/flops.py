"""What images and prompts cost, in operations: the paper's formula, and the exact count module by module.

The exact counts are of matrix products (a multiplication and its addition are two), as ``torch.utils.flop_counter`` has
them; tests/measuring/test_flops.py compares the two, module by module.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Operations of a prefill in which every layer sees all tokens: the sum of :func:`llama_module_flops`.

    Args:
        config: of a Llama, Mistral or Qwen2 model.
        tokens: the prompt's length with its visual tokens.
    """
    return sum(llama_module_flops(config, [tokens] * config.num_hidden_layers).values())


def llama_module_flops(config: Any, lengths: Sequence[int]) -> dict[str, int]:
    """Operations of one prompt's prefill by module, over all layers.

    Projections with grouped keys and values, the two products of attention over the whole square (fused kernels may
    skip its upper half), the three of SwiGLU, and the logits of the last position, as ``generate`` computes them.

    Args:
        config: of a Llama, Mistral or Qwen2 model.
        lengths: tokens that each layer sees; they differ where a method prunes between layers.

    Returns:
        By the module's name inside a layer; ``self_attn`` are the two products that are no module's.

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
    """Operations of a CLIP tower by module, over the layers that run.

    Args:
        config: of a CLIP vision model.
        images: images or tiles.
        layers: how many layers run (LLaVA: all but the last).

    Returns:
        By the module's name, inside a layer for those of layers; ``self_attn`` as in :func:`llama_module_flops`.
    """
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    length = patches + 1
    linear = 2 * images * layers * length * width
    flops = {"embeddings.patch_embedding": 2 * images * patches * config.num_channels * config.patch_size**2 * width}
    flops |= {f"self_attn.{name}": linear * width for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    flops["self_attn"] = 4 * images * layers * length**2 * width
    return flops | {f"mlp.{name}": linear * config.intermediate_size for name in ("fc1", "fc2")}


def compression_flops(config: Any, images: int, dominant: int, contextual: int) -> dict[str, int]:
    """Operations that VisionZip adds to a CLIP tower.

    Args:
        config: of the CLIP vision model.
        images: images or tiles.
        dominant: K, CLS included.
        contextual: M.

    Returns:
        ``score``: the CLS row of attention; ``similarity``: of the rest to the targets; ``merge``: the weighted sums.
    """
    length = (config.image_size // config.patch_size) ** 2 + 1
    if dominant + contextual >= length:  # nothing is compressed, but the row is computed
        contextual = 0
    per_head = config.hidden_size // config.num_attention_heads
    return {
        "score": 2 * images * length * config.hidden_size,
        "similarity": 2 * images * (length - dominant) * contextual * per_head,
        "merge": 2 * images * contextual * length * config.hidden_size,
    }


def projector_flops(vision_size: int, hidden_size: int, tokens: int) -> int:
    """Operations of LLaVA's projector (``mlp2x_gelu``) on some visual tokens."""
    return 2 * tokens * hidden_size * (vision_size + hidden_size)

"""The size bias: the language model attends to a visual token as if it were there once for each patch it stands for.

For a token that stands for s patches, log(s) is added to its attention logits, in every layer and head and for every
later query (ToMe's proportional attention, arXiv 2210.09461). The bias is added to the attention mask that transformers
makes, so that no forward has to be written again. The sizes of a prompt are noted on its KV cache, so that decoding,
later turns, cropping, beams and batches have them. Without sizes nothing is added.

An attention kernel has to take an additive mask for this: ``sdpa`` and ``eager`` do, flash attention does not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from visionzip.language.cache_notes import note, recall, with_own_cache

_NOTE = "_visionzip_log_sizes"  # attribute of a KV cache: (B, P), log(size) of its first P tokens
_KERNELS = ("sdpa", "eager")
_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def attach_size_bias(backbone: nn.Module) -> RemovableHandle:
    """Let a text backbone take ``token_sizes``, by a forward pre-hook that the returned handle removes.

    The backbone (``LlamaModel``, ``MistralModel``, ``Qwen2Model``, …) can then be called with one more keyword,
    ``token_sizes`` (B, L) float32: the sizes of the L tokens of this call, 1 for every token that is no kept visual
    token. The sizes of tokens in the KV cache are noted on it.

    Raises:
        ValueError: the backbone's attention takes no additive mask, or it has layers of an unknown kind.
    """
    check_attention(backbone.config)
    return backbone.register_forward_pre_hook(_before_forward, with_kwargs=True)


def check_attention(config: Any) -> None:
    """Check that a language model's attention takes a size bias.

    Args:
        config: the language model's config.

    Raises:
        ValueError: the attention kernel takes no additive mask, or there are layers of an unknown kind.
    """
    kernel = config._attn_implementation
    if kernel not in (None, *_KERNELS):
        raise ValueError(
            f"size_bias needs attention that takes an additive mask, and attn_implementation={kernel!r} takes none: "
            "load the model with attn_implementation='sdpa', or set size_bias=False"
        )
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - set(_MASKS)):
        raise ValueError(
            f"size_bias is for layers of {' and '.join(_MASKS)}, and this language model has {', '.join(unknown)}: set "
            "size_bias=False"
        )


def with_size_bias(backbone: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Turn ``token_sizes`` among the arguments of a backbone's forward into an attention mask.

    Args:
        backbone: the text backbone.
        arguments: the arguments of its forward, by name.

    Returns:
        The arguments without ``token_sizes``, and with a mask if the call or its cache has sizes.

    Raises:
        ValueError: there is not one size for each token, or the attention takes no size bias.
    """
    sizes: Tensor | None = arguments.get("token_sizes")
    arguments = {name: value for name, value in arguments.items() if name != "token_sizes"}
    cache = arguments.get("past_key_values")
    if sizes is None and not hasattr(cache, _NOTE):
        return arguments
    embeds = arguments.get("inputs_embeds")
    given = arguments["input_ids"] if embeds is None else embeds
    rows, length = given.shape[:2]
    if sizes is not None and tuple(sizes.shape) != (rows, length):
        raise ValueError(
            f"token_sizes has shape {tuple(sizes.shape)}, but the language model is given tokens of {(rows, length)}: "
            "give one size for each token (1 for text), and generate with use_cache=True and without chunks"
        )
    check_attention(backbone.config)
    logarithms = recall(cache, _NOTE, rows, step=length == 1 and sizes is None)
    if sizes is not None:
        arguments = with_own_cache(backbone, arguments)
        cache = arguments.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        before = sizes.new_zeros(rows, 0) if logarithms is None else logarithms.to(sizes)
        logarithms = torch.cat([F.pad(before, (0, past - before.shape[1])), sizes.log()], dim=1)
        note(cache, _NOTE, logarithms)
    if logarithms is None:  # the cache was emptied
        return arguments
    dtype = backbone.get_input_embeddings().weight.dtype if embeds is None else embeds.dtype
    shape = torch.empty(
        (rows, length, 0), dtype=dtype, device=given.device
    )  # the masks need only shape, type and device
    return arguments | {
        "attention_mask": _masks(backbone.config, shape, arguments.get("attention_mask"), cache, logarithms)
    }


def _before_forward(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        kwargs, args = dict(zip(_parameters(type(backbone).forward), args, strict=False)) | kwargs, ()
    return args, with_size_bias(backbone, kwargs)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _masks(config: Any, embeds: Tensor, given: Any, cache: Cache | None, logarithms: Tensor) -> Any:
    """Make the mask of all layers, or a dict of one for each kind of layer if the model has several kinds."""

    def mask(kind: str) -> Tensor:
        own = given.get(kind) if isinstance(given, dict) else given
        layer = _layer(cache, sliding=kind == "sliding_attention")
        if (
            own is None or own.ndim == 2
        ):  # without position_ids: transformers would take a jump of them for another packed prompt
            own = _MASKS[kind](config, embeds, own, cache, layer_idx=layer, allow_is_causal_skip=False)
        offset = 0 if cache is None else cache.get_mask_sizes(embeds.shape[1], layer)[1]
        if not isinstance(offset, int):
            raise ValueError(
                "size_bias does not fit a static cache of a sliding window: leave cache_implementation out"
            )
        return _biased(own, logarithms.to(embeds.device), offset, embeds.dtype)

    if types := getattr(config, "layer_types", None):
        return {kind: mask(kind) for kind in set(types)}
    return mask("full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention")


def _layer(cache: Cache | None, sliding: bool) -> int:
    """Find a layer of the cache that attends to a sliding window, or one that does not; 0 if there is none."""
    kinds = [] if cache is None else list(cache.is_sliding)
    return kinds.index(sliding) if sliding in kinds else 0


def _biased(mask: Tensor, logarithms: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Add log(size) to a boolean or additive mask (B, 1, L, W), whose first column is token ``offset``.

    The logarithms (B, P) are those of tokens 0 to P - 1; later tokens have size 1.
    """
    end = offset + mask.shape[-1]
    bias = F.pad(logarithms, (0, max(0, end - logarithms.shape[1])))[:, None, None, offset:end].to(dtype)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return torch.where(allowed, bias, torch.finfo(dtype).min)

"""The size bias: in the language model, a visual token is attended to by how many patches it stands for.

A token that stands for s patches gets log s added to its attention logits, in every layer and head and for every query
behind it, as if it were there s times (ToMe's proportional attention, arXiv 2210.09461). It goes in through the
attention mask, as transformers makes it, so that no forward is written again. The sizes of a prompt are noted on its KV
cache: decoding, later turns, cropping, beams and batches follow. Without sizes nothing is added.

Attention kernels that take an additive mask can do this: ``sdpa`` and ``eager``. Flash attention cannot.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from visionzip.language.cache_notes import note, recall, with_own_cache

_NOTE = "_visionzip_log_sizes"  # attribute of a KV cache: (B, P) logarithms of its first P tokens' sizes
_KERNELS = ("sdpa", "eager")
_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def attach_size_bias(backbone: nn.Module) -> RemovableHandle:
    """Let a text backbone take ``token_sizes``, by a forward pre-hook that the handle takes off again.

    The backbone (``LlamaModel``, ``MistralModel``, ``Qwen2Model``, …) is then called with a keyword more:
    ``token_sizes`` (B, L) float32 for the L tokens that the call gives it, 1 where one is no kept visual token. Sizes
    of tokens that are in the KV cache are known from it.

    Raises:
        ValueError: the backbone's attention takes no additive mask, or its layers attend in a way that is not known.
    """
    check_attention(backbone.config)
    return backbone.register_forward_pre_hook(_before_forward, with_kwargs=True)


def check_attention(config: Any) -> None:
    """Check that a language model's attention can be given a size bias.

    Args:
        config: of the language model.

    Raises:
        ValueError: it takes no additive mask, or its layers attend in a way that is not known.
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
    """The arguments of a backbone's forward, with ``token_sizes`` turned into an attention mask.

    Args:
        backbone: as in :func:`attach_size_bias`.
        arguments: by name.

    Returns:
        The same without ``token_sizes`` where neither the call nor its cache has sizes.

    Raises:
        ValueError: the sizes are not those of the tokens, or what :func:`check_attention` raises.
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
            "give one size for each (1 for text), and generate with use_cache=True and without chunks"
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
    shape = torch.empty((rows, length, 0), dtype=dtype, device=given.device)  # all that the masks need of embeddings
    return arguments | {
        "attention_mask": _masks(backbone.config, shape, arguments.get("attention_mask"), cache, logarithms)
    }


def _before_forward(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        kwargs, args = dict(zip(_parameters(type(backbone)), args, strict=False)) | kwargs, ()
    return args, with_size_bias(backbone, kwargs)


@functools.cache
def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]


def _masks(config: Any, embeds: Tensor, given: Any, cache: Cache | None, logarithms: Tensor) -> Any:
    """The mask of all layers, or one for each type of layer where the model has several."""

    def mask(kind: str) -> Tensor:
        own = given.get(kind) if isinstance(given, dict) else given
        layer = _layer(cache, sliding=kind == "sliding_attention")
        if own is None or own.ndim == 2:  # position_ids, which may jump, would be taken for several packed prompts
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
    """A layer of the cache that attends in this way."""
    kinds = [] if cache is None else list(cache.is_sliding)
    return kinds.index(sliding) if sliding in kinds else 0


def _biased(mask: Tensor, logarithms: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """An additive mask (B, 1, L, W) of a boolean or additive one, whose first column is token ``offset``.

    The logarithms (B, P) are those of tokens 0 to P - 1; later ones have 0.
    """
    end = offset + mask.shape[-1]
    bias = F.pad(logarithms, (0, max(0, end - logarithms.shape[1])))[:, None, None, offset:end].to(dtype)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return torch.where(allowed, bias, torch.finfo(dtype).min)

"""Attach FastV or SparseVLM to a model, and take it off again.

Hooks on this one model's layers prune (:mod:`visionzip.language.stages`); all layers keep their attention kernel, and
no class is modified. The hooks are told where visual tokens are by ``visual_mask`` (B, L), an argument of the language
model. LLaVA's own classes pass it. Transformers' classes hand arguments that they do not know down to their language
model, so a hook on the base model adds it, read off the placeholders in ``input_ids``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from visionzip.apply import unwrap
from visionzip.config import VisionZipConfig
from visionzip.integrations import find_integration
from visionzip.language.stages import Pruning, before_backbone, before_layer
from visionzip.methods import has_size_bias

Model = TypeVar("Model", bound=nn.Module)

_HANDLES = "_visionzip_pruning"  # attribute of the model: the hooks that are attached
_IMAGES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")


def attach_pruning(model: Model, pruning: Pruning) -> Model:
    """Put a method's hooks on a model, in the place of any that are there.

    Raises:
        TypeError: the model is of no supported family, has no language model, or one whose positions have three axes.
        ValueError: a layer or a number to keep is outside its limits, or the model is zipped with a size bias.
    """
    target = _generating(model)
    base = getattr(target, "base_model", None)
    backbone = getattr(base, "language_model", base)
    if not hasattr(backbone, "layers"):
        raise TypeError(f"{type(target).__name__} is no language model: give the LLaVA model, not its vision tower")
    if hasattr(base, "get_rope_index"):  # behind the cut, patches would stand in a line
        raise TypeError(
            f"{type(target).__name__} has positions with three axes (M-RoPE), and pruning inside a language model "
            "knows one: use visionzip(model, keep=…)"
        )
    _check(pruning, len(backbone.layers))
    if (stored := getattr(target.config, "visionzip", None)) and has_size_bias(VisionZipConfig.from_dict(stored)):
        raise ValueError(
            "this model is zipped with size_bias, which does not go with pruning inside its language model: call "
            "visionzip(model, …, size_bias=False) or unzip(model) first"
        )
    remove_pruning(model)
    handles = [target.register_forward_pre_hook(_refuse_labels, with_kwargs=True)]
    if base is not backbone:
        handles.append(base.register_forward_pre_hook(_mark_visual, with_kwargs=True))
    handles.append(backbone.register_forward_pre_hook(partial(before_backbone, pruning), with_kwargs=True))
    handles += [
        layer.register_forward_pre_hook(partial(before_layer, pruning, backbone, index), with_kwargs=True)
        for index, layer in enumerate(backbone.layers)
    ]
    setattr(target, _HANDLES, handles)
    for name, function in _OF_GENERATE.items():
        setattr(target, name, partial(function, target))
    return model


def remove_pruning(model: Model) -> Model:
    """Undo :func:`fastv` or :func:`sparsevlm`: the model answers as before; without either, nothing happens.

    Text behind the KV cache of a pruned prompt needs the method that has pruned it.

    Raises:
        TypeError: the model is of no supported family.
    """
    if is_pruned(model):
        attributes = vars(_generating(model))
        for handle in attributes.pop(_HANDLES):
            handle.remove()
        for name in _OF_GENERATE:
            attributes.pop(name, None)
    return model


def is_pruned(model: nn.Module) -> bool:
    """Say whether :func:`fastv` or :func:`sparsevlm` is on a model."""
    return _HANDLES in vars(_generating(model))


def refuse_size_bias(model: nn.Module) -> None:
    """Refuse a size bias on a model that prunes inside: its layers see masks of their own.

    Raises:
        ValueError: FastV or SparseVLM is on it.
    """
    if is_pruned(model):
        raise ValueError(
            "this model prunes visual tokens inside its language model (FastV, SparseVLM), which size_bias does not go "
            "with: call remove_pruning(model) first, or set size_bias=False"
        )


def _generating(model: nn.Module) -> nn.Module:
    """Find the model whose ``generate`` runs, inside wrappers of PEFT, ``torch.compile`` and llava."""
    target = unwrap(model)
    return find_integration(target).generating(target)


def _check(pruning: Pruning, layers: int) -> None:
    """Check that the model has the scored layers, one behind them, and that what they keep is possible."""
    for layer, keep in pruning.keep.items():
        if not 0 <= layer < layers - 1:
            raise ValueError(
                f"visual tokens cannot be pruned after layer {layer} of {layers} (0 to {layers - 1}): use 0 to "
                f"{layers - 2}, so that a layer is left that gains by it"
            )
        least, most = (0.0, 1.0) if isinstance(keep, float) else (0, None)
        if keep < least or (most is not None and keep > most):
            raise ValueError(
                f"keep={keep} after layer {layer}: give a number of visual tokens, 0 or more, or a fraction of them, "
                "0.0 to 1.0"
            )


def _refuse_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a loss, which would compare labels with logits of a shorter prompt."""
    if kwargs.get("labels") is not None:
        raise ValueError("a model that prunes visual tokens inside has no loss: call remove_pruning(model) to train")


def _prefill_once(
    model: nn.Module, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Run ``generate``'s prefill, whose one forward has to see the prompt's last token and fill a cache.

    Raises:
        ValueError: it is to run in chunks or without a cache, so that several forwards would choose.
    """
    if (size := generation_config.prefill_chunk_size) is not None:
        raise ValueError(
            f"prefill_chunk_size={size}: visual tokens are pruned with their whole prompt only, which the first chunk "
            "does not see: leave it out"
        )
    if not model_kwargs.get("use_cache", True):
        raise ValueError(
            "use_cache=False: visual tokens are pruned once for the whole answer, which needs the KV cache: generate "
            "with use_cache=True"
        )
    return type(model)._prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)


def _allow_visual_mask(model: nn.Module, model_kwargs: dict[str, Any]) -> None:
    """Check ``generate``'s arguments as the model's class does, which may not know ``visual_mask``."""
    known = {name: value for name, value in model_kwargs.items() if name != "visual_mask"}
    type(model)._validate_model_kwargs(model, known)


def _refuse_drafts(model: nn.Module, **kwargs: Any) -> Any:
    """Make ``generate``'s source of drafted tokens, which it appends to a prompt of ids before the first forward.

    Raises:
        ValueError: the prompt has images, whose tokens would be chosen by the last draft.
    """
    if _images_given(kwargs["model_kwargs"]) and kwargs["model_kwargs"].get("inputs_embeds") is None:
        raise ValueError(
            "tokens are drafted (assistant_model, prompt_lookup_num_tokens, …), but visual tokens are pruned by the "
            "prompt's last token, behind which transformers puts the drafts: leave it out"
        )
    return type(model)._get_candidate_generator(model, **kwargs)


# Steps of transformers' ``generate`` in whose place a pruned model has these.
_OF_GENERATE = {
    "_prefill": _prefill_once,
    "_validate_model_kwargs": _allow_visual_mask,
    "_get_candidate_generator": _refuse_drafts,
}


def _images_given(arguments: Mapping[str, Any]) -> str | None:
    """Find the argument that brings images or videos, as pixels or encoded."""
    return next((name for name in _IMAGES if arguments.get(name) is not None and len(arguments[name])), None)


def _mark_visual(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell the language model of a transformers model which tokens are visual, by their placeholders.

    Raises:
        ValueError: there are images, but no ids.
    """
    given = kwargs
    if args:
        given = dict(zip(inspect.signature(type(base).forward).parameters, (base, *args), strict=False)) | kwargs
    if (images := _images_given(given)) is None or given.get("visual_mask") is not None:
        return None  # text, for which placeholders are words like others, or a step of decoding
    if (ids := given.get("input_ids")) is None:
        raise ValueError(
            f"{images} came with inputs_embeds, but visual tokens are pruned where input_ids has their placeholders: "
            "give input_ids"
        )
    placeholders = [getattr(base.config, f"{name}_token_id", None) for name in ("image", "video")]
    visual = torch.isin(ids, ids.new_tensor([each for each in placeholders if each is not None]))
    return args, {**kwargs, "visual_mask": visual}

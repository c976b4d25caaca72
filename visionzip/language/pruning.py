"""Attach FastV or SparseVLM to a model, and remove it again.

Hooks on the layers of this one model prune (:mod:`visionzip.language.stages`). All layers keep their attention kernel,
and no class is modified. The hooks learn which tokens are visual from ``visual_mask`` (B, L), an additional argument of
the language model. The LLaVA classes of this repository pass it. The classes of transformers pass unknown arguments on
to their language model, so for them a hook on the base model adds it, from the placeholders in ``input_ids``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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

_HANDLES = "_visionzip_pruning"  # attribute of the model that holds the handles of the hooks
_BACKBONES = ("language_model", "text_model")  # attributes of a base model that may hold the text backbone
_KNOWN = ("llama", "mistral", "qwen2")  # families of transformers whose layers the hooks know
_IMAGES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")


def attach_pruning(model: Model, pruning: Pruning) -> Model:
    """Attach the hooks of a pruning method to a model; they replace those of another one.

    Raises:
        TypeError: the model's family is not supported, it has no language model, or that has unknown layers.
        ValueError: a layer or a number to keep is outside its limits, or the model is zipped with a size bias.
    """
    target = _generating(model)
    base = getattr(target, "base_model", None)
    inner = (getattr(base, name, None) for name in _BACKBONES)
    backbone: Any = next((module for module in inner if module is not None), base)
    if not hasattr(backbone, "layers"):
        raise TypeError(f"{type(target).__name__} is no language model: give the LLaVA model, not its vision tower")
    layer = type(backbone.layers[0])
    if not {f"transformers.models.{name}.modeling_{name}" for name in _KNOWN} & {c.__module__ for c in layer.__mro__}:
        raise TypeError(
            f"FastV and SparseVLM prune inside layers of {', '.join(_KNOWN)}, whose positions have one axis; this "
            f"{type(target).__name__} has {layer.__name__}: use a method that chooses before the language model"
        )
    _check(pruning, len(backbone.layers))
    if (stored := getattr(target.config, "visionzip", None)) and has_size_bias(VisionZipConfig.from_dict(stored)):
        raise ValueError(
            "this model is zipped with size_bias, which does not work with pruning inside its language model: call "
            "visionzip(model, …, size_bias=False) or unzip(model) first"
        )
    remove_pruning(model)
    handles = [target.register_forward_pre_hook(_refuse_labels, with_kwargs=True)]
    if base is not None and base is not backbone:
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
    """Undo :func:`fastv` or :func:`sparsevlm`: the model answers as before. Without either, nothing happens.

    KV caches of pruned prompts cannot be continued afterwards: the text that follows needs the pruning's hooks.

    Raises:
        TypeError: the model's family is not supported.
    """
    if is_pruned(model):
        attributes = vars(_generating(model))
        for handle in attributes.pop(_HANDLES):
            handle.remove()
        for name in _OF_GENERATE:
            attributes.pop(name, None)
    return model


def is_pruned(model: nn.Module) -> bool:
    """Say whether :func:`fastv` or :func:`sparsevlm` is attached to a model."""
    return _HANDLES in vars(_generating(model))


def refuse_size_bias(model: nn.Module) -> None:
    """Refuse a size bias on a model with FastV or SparseVLM, whose layers get masks without it.

    Raises:
        ValueError: one of the two is attached to the model.
    """
    if is_pruned(model):
        raise ValueError(
            "this model prunes visual tokens inside its language model (FastV, SparseVLM), and size_bias does not work "
            "with that: call remove_pruning(model) first, or set size_bias=False"
        )


def _generating(model: nn.Module) -> nn.Module:
    """Find the model whose ``generate`` runs inside wrappers of PEFT, ``torch.compile`` and llava."""
    target = unwrap(model)
    return find_integration(target).generating(target)


def _check(pruning: Pruning, layers: int) -> None:
    """Check that the scored layers exist, that a layer follows each, and that the numbers to keep are possible."""
    for layer, keep in pruning.keep.items():
        if not 0 <= layer < layers - 1:
            raise ValueError(
                f"visual tokens cannot be pruned after layer {layer} of {layers} (0 to {layers - 1}): use 0 to "
                f"{layers - 2}, so that at least one layer sees fewer tokens"
            )
        if keep < 0 or (isinstance(keep, float) and keep > 1):
            raise ValueError(
                f"keep={keep} after layer {layer}: give a number of visual tokens, 0 or more, or a fraction of them, "
                "0.0 to 1.0"
            )


def _refuse_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse labels: the loss would compare them with the logits of a shorter prompt."""
    if kwargs.get("labels") is not None:
        raise ValueError(
            "a model that prunes inside its language model has no loss: call remove_pruning(model) to train"
        )


def _prefill_once(
    model: nn.Module, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Run the prefill of ``generate``, which has to be a single forward that sees the whole prompt and fills a cache.

    Raises:
        ValueError: the prefill is to run in chunks or without a cache, so that several forwards would choose tokens.
    """
    if (size := generation_config.prefill_chunk_size) is not None:
        raise ValueError(
            f"prefill_chunk_size={size}: visual tokens are pruned by the prompt's last token, which the first chunk "
            "does not have: leave prefill_chunk_size out"
        )
    if not model_kwargs.get("use_cache", True):
        raise ValueError(
            "use_cache=False: visual tokens are pruned once for the whole answer, so the KV cache has to keep the "
            "choice: generate with use_cache=True"
        )
    return type(model)._prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)


def _allow_visual_mask(model: nn.Module, model_kwargs: dict[str, Any]) -> None:
    """Check the arguments of ``generate`` as the model's class does, but for ``visual_mask``, which it may not know."""
    known = {name: value for name, value in model_kwargs.items() if name != "visual_mask"}
    type(model)._validate_model_kwargs(model, known)


def _refuse_drafts(model: nn.Module, **kwargs: Any) -> Any:
    """Make the source of drafted tokens for ``generate``, which appends drafts to a prompt before the first forward.

    Raises:
        ValueError: the prompt has images, whose tokens would then be chosen by the last draft.
    """
    if _images_given(kwargs["model_kwargs"]) and kwargs["model_kwargs"].get("inputs_embeds") is None:
        raise ValueError(
            "drafted tokens (assistant_model, prompt_lookup_num_tokens, …) do not work with pruning: the prompt's last "
            "token chooses visual tokens, and transformers appends the drafts to the prompt. Leave them out"
        )
    return type(model)._get_candidate_generator(model, **kwargs)


# The steps of transformers' ``generate`` that a pruned model replaces, by their names there.
_OF_GENERATE: dict[str, Callable[..., Any]] = {
    "_prefill": _prefill_once,
    "_validate_model_kwargs": _allow_visual_mask,
    "_get_candidate_generator": _refuse_drafts,
}


def _images_given(arguments: Mapping[str, Any]) -> str | None:
    """Name the argument that has images or videos, as pixels or encoded; None if there is none."""
    return next((name for name in _IMAGES if arguments.get(name) is not None and len(arguments[name])), None)


def _mark_visual(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Add ``visual_mask`` to a call of a base model of transformers, by the placeholders in its ``input_ids``.

    Raises:
        ValueError: there are images, but no ids.
    """
    given = kwargs
    if args:
        given = dict(zip(inspect.signature(type(base).forward).parameters, (base, *args), strict=False)) | kwargs
    if (images := _images_given(given)) is None or given.get("visual_mask") is not None:
        return None  # a prompt without images, or a step of decoding
    if (ids := given.get("input_ids")) is None:
        raise ValueError(
            f"{images} came with inputs_embeds, but visual tokens are found by their placeholders in input_ids: give "
            "input_ids"
        )
    placeholders = [getattr(base.config, f"{name}_token_id", None) for name in ("image", "video")]
    visual = torch.isin(ids, ids.new_tensor([each for each in placeholders if each is not None]))
    return args, {**kwargs, "visual_mask": visual}

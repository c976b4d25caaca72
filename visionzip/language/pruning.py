"""Prune visual tokens inside a language model: what FastV and SparseVLM share.

Both methods read the attention that visual tokens get in a layer, keep those that get most, and let the layers after it
see only these. Hooks on one model's layers do this: before the scored layer, one computes the needed rows of attention
from that layer's own queries and keys; before the next layer, one shortens the hidden states; from there on, each layer
is given the mask and positions of its own tokens. All layers keep their attention kernel, each layer's KV cache holds
the tokens that this layer has seen, and no class is modified. The record of these tokens lies on the conversation's
cache, so that batches, beams and threads do not disturb each other.

The hooks are told where visual tokens are by ``visual_mask`` (B, L), an argument of the language model. LLaVA's own
classes pass it. Transformers' classes hand their extra arguments down to their language model, so a hook on the base
model adds it there, read off the placeholders in ``input_ids``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from visionzip.apply import unwrap
from visionzip.integrations import find_integration
from visionzip.language.selection import Keep, attention_received, keep_top, number_to_keep

Model = TypeVar("Model", bound=nn.Module)

_HANDLES = "_visionzip_pruning"  # attribute of the model: the hooks that are attached
_STAGES = "_visionzip_stages"  # attribute of a KV cache: what its later layers have seen of the prompt
_PROMPT = "visionzip_prompt"  # argument that the hooks hand from the backbone to its layers
_IMAGES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")


@dataclass(frozen=True)
class Pruning:
    """How one method prunes.

    Attributes:
        keep: by scored layer (0 is the first), how many visual tokens of a prompt the next layer gets: a number, or a
            fraction of the prompt's.
        queries: which tokens' attention is the score: a mask (L,) from one prompt's embeddings (L, D), its mask of
            visual tokens (L,) and its mask of those that are not padding (L,).
        recycle: makes tokens (m, D) of those that are dropped (n, D) and their scores (n,); None drops them.
        renumber: the shortened prompt has consecutive positions; else tokens keep the positions that they had.
    """

    keep: Mapping[int, Keep]
    queries: Callable[[Tensor, Tensor, Tensor], Tensor]
    recycle: Callable[[Tensor, Tensor], Tensor] | None = None
    renumber: bool = False


@dataclass
class Stage:
    """What the layers from one on see of the prompts: S slots each, fewer than the prompts' L.

    Attributes:
        layer: the first of them.
        length: L.
        kept: (B, S) positions in the prompt (0 to L - 1) of what is in the slots; -1 for recycled tokens and for slots
            that are only there because another prompt of the batch keeps more.
        real: (B, S) false for padding.
        visual: (B, S) true for visual tokens, recycled ones too.
        queries: (B, S) true for the tokens whose attention is the score.
        positions: (B, S) position ids.
        shift: (B, 1) by how much the positions of what follows are lower than in the first layer.
    """

    layer: int
    length: int
    kept: Tensor
    real: Tensor
    visual: Tensor
    queries: Tensor
    positions: Tensor
    shift: Tensor


@dataclass
class _Pass:
    """One forward of the backbone: the stages so far, the last one first needed; ``scores`` wait for the next layer."""

    attention_mask: Tensor | None
    stages: list[Stage]
    prefill: bool
    visual: Tensor | None = None  # (B, n) numbers of visual tokens of the prompts
    scores: Tensor | None = None
    # masks and positions, by a stage's first layer and whether attention is windowed
    arguments: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)


def attach_pruning(model: Model, pruning: Pruning) -> Model:
    """Put a method's hooks on a model, in the place of any that are there.

    Raises:
        TypeError: the model is of no supported family, or has no language model.
        ValueError: a layer or a number to keep is outside its limits.
    """
    target = _generating(model)
    base = getattr(target, "base_model", None)
    backbone = getattr(base, "language_model", base)
    if not hasattr(backbone, "layers"):
        raise TypeError(f"{type(target).__name__} is no language model: give the LLaVA model, not its vision tower")
    _check(pruning, len(backbone.layers))
    remove_pruning(model)
    handles = [target.register_forward_pre_hook(_refuse_labels, with_kwargs=True)]
    if base is not backbone:
        handles.append(base.register_forward_pre_hook(_mark_visual, with_kwargs=True))
    handles.append(backbone.register_forward_pre_hook(partial(_before_backbone, pruning), with_kwargs=True))
    handles += [
        layer.register_forward_pre_hook(partial(_before_layer, pruning, backbone, index), with_kwargs=True)
        for index, layer in enumerate(backbone.layers)
    ]
    setattr(target, _HANDLES, handles)
    for name, function in _OF_GENERATE.items():
        setattr(target, name, partial(function, target))
    return model


def remove_pruning(model: Model) -> Model:
    """Undo :func:`fastv` or :func:`sparsevlm`: the model answers as before; without either, nothing happens.

    A conversation that goes on with the KV cache of a pruned prompt needs the method that has pruned it.

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


def seen_of_prompt(cache: Cache) -> list[Stage]:
    """What the layers of a KV cache have seen of its prompt, one :class:`Stage` for each time that it was pruned."""
    return list(getattr(cache, _STAGES, []))


def _generating(model: nn.Module) -> nn.Module:
    """Find the object whose ``generate`` runs, which the hooks hang on: inside wrappers of PEFT, compile and llava."""
    target = unwrap(model)
    return find_integration(target).generating(target)


def _check(pruning: Pruning, layers: int) -> None:
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


def _before_backbone(
    pruning: Pruning, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Start a pass over the layers for a prompt to prune, or for tokens that follow one that was pruned."""
    visual = kwargs.pop("visual_mask", None)  # the layers do not know it
    if (current := _new_pass(pruning, backbone, visual, kwargs)) is not None:
        kwargs[_PROMPT] = current
    return args, kwargs


def _new_pass(pruning: Pruning, backbone: nn.Module, visual: Tensor | None, kwargs: dict[str, Any]) -> _Pass | None:
    """What kind of forward this is: a prompt to prune, tokens that follow one that was pruned, or neither (None)."""
    cache, embeds, mask = (kwargs.get(name) for name in ("past_key_values", "inputs_embeds", "attention_mask"))
    past = 0 if cache is None else cache.get_seq_length()
    fresh = visual is not None and embeds is not None and visual.shape[1] == embeds.shape[1] and bool(visual.any())
    if past:
        if fresh:
            raise ValueError(
                "visual tokens follow a KV cache, but they are pruned with their whole prompt only: give the "
                "conversation from its beginning, without past_key_values"
            )
        stages = seen_of_prompt(cache)
        return _Pass(mask, stages, prefill=False) if stages else None
    if cache is not None:
        cache.__dict__.pop(_STAGES, None)  # of a prompt before cache.reset()
    if not fresh:
        if visual is not None and bool(visual.any()):
            raise ValueError(
                f"visual_mask is for {visual.shape[1]} tokens, but the forward without a KV cache has others: generate "
                "with use_cache=True and without chunks"
            )
        return None
    batch, length = visual.shape
    window = getattr(backbone.config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(f"a prompt of {length} tokens is longer than sliding_window={window}: it cannot be pruned")
    if cache is not None and not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(f"pruning needs a KV cache that grows (DynamicCache), not {type(cache).__name__}")
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: pruning needs (B, L), 0 for padding")
    real = torch.ones_like(visual) if mask is None else mask.bool()
    visual = visual & real
    rows = zip(embeds, visual, real, strict=True)
    queries = torch.stack([pruning.queries(*row) for row in rows])
    slots = torch.arange(length, device=visual.device).expand(batch, -1)
    whole = Stage(0, length, slots, real, visual, queries, slots, slots[:, :1] * 0)
    return _Pass(mask, [whole], prefill=True, visual=visual.sum(dim=1))


def _before_layer(
    pruning: Pruning, backbone: nn.Module, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Shorten what a layer gets if the one before it was scored, tell it what it sees, and score it if it is to be."""
    if (current := kwargs.pop(_PROMPT, None)) is None:
        return None
    hidden, cache = args[0], kwargs.get("past_key_values")
    if current.prefill:
        if index == 0:  # the backbone's positions of the prompt
            current.stages[0].positions = kwargs["position_ids"].expand(len(hidden), -1)
        if current.scores is not None:
            hidden = _shorten(pruning, current, index, hidden)
            if cache is not None and len(current.stages) > 1:
                setattr(cache, _STAGES, current.stages[1:])
    if (stage := next((stage for stage in reversed(current.stages) if 0 < stage.layer <= index), None)) is not None:
        kind = stage.layer, _has_window(backbone.config, index)
        if kind not in current.arguments:
            current.arguments[kind] = _arguments(backbone, current, stage, index, hidden, kwargs)
        kwargs = {**kwargs, **current.arguments[kind]}
    if current.prefill and index in pruning.keep:
        newest = current.stages[-1]
        with torch.no_grad():
            current.scores = attention_received(
                layer, hidden, kwargs["position_embeddings"], newest.queries, newest.real
            ).to(newest.real.device)
    return (hidden, *args[1:]), kwargs


def _shorten(pruning: Pruning, current: _Pass, index: int, hidden: Tensor) -> Tensor:
    """Take out what the layer before was told not to keep, and describe what is left as a new stage."""
    scores, before = current.scores, current.stages[-1]
    current.scores = None
    keep = pruning.keep[index - 1]
    wanted = [number_to_keep(keep, number) for number in current.visual.tolist()]
    chosen = torch.stack([keep_top(*row) for row in zip(scores, before.visual, wanted, strict=True)])
    dropped = before.visual & ~chosen
    if not dropped.any():
        return hidden
    columns: dict[str, list[Tensor]] = {"hidden": [], "kept": [], "real": [], "visual": [], "queries": [], "places": []}
    for row, out in enumerate(dropped):
        extra = hidden[row, :0]
        if pruning.recycle is not None and out.any():
            extra = pruning.recycle(hidden[row, out.to(hidden.device)], scores[row, out])
        # merged tokens come after the visual ones, before the text that follows
        last = int(before.visual[row].nonzero().max()) + 1 if before.visual[row].any() else 0
        for name, values, of_extra in (
            ("hidden", hidden, extra),
            ("kept", before.kept, -1),
            ("real", before.real, True),
            ("visual", before.visual, True),
            ("queries", before.queries, False),
            ("places", before.positions, 0),
        ):
            stays = ~out.to(values.device)
            new = of_extra if isinstance(of_extra, Tensor) else values.new_full((len(extra),), of_extra)
            head, tail = values[row, :last][stays[:last]], values[row, last:][stays[last:]]
            columns[name].append(torch.cat([head, new, tail]))
    fills = {"kept": -1, "real": False, "visual": False, "queries": False, "places": 0, "hidden": 0.0}
    padded = {
        name: pad_sequence(rows, batch_first=True, padding_side="left", padding_value=fills[name])
        for name, rows in columns.items()
    }
    real, positions, shift = padded["real"], padded.pop("places"), before.shift
    if pruning.renumber:
        first = before.positions.gather(1, before.real.long().argmax(dim=1, keepdim=True))
        positions = (first + real.cumsum(dim=1) - 1).clamp(min=0)
        shift = before.shift + before.real.sum(dim=1, keepdim=True) - real.sum(dim=1, keepdim=True)
    hidden = padded.pop("hidden")
    current.stages.append(Stage(index, before.length, positions=positions, shift=shift, **padded))
    return hidden


def _arguments(
    backbone: nn.Module, current: _Pass, stage: Stage, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Make a stage's mask and positions for its layer ``index``, as the backbone makes those of the whole prompt."""
    cache = kwargs.get("past_key_values")
    if current.prefill:
        positions, cache, seen = stage.positions, None, stage.real
    else:
        positions = kwargs["position_ids"] - stage.shift
        length = cache.get_seq_length(index) + hidden.shape[1] - stage.real.shape[1]
        later = stage.real.new_ones(len(hidden), length)
        if current.attention_mask is not None:
            later = current.attention_mask[:, stage.length :].to(later)
        seen = torch.cat([stage.real, later], dim=1)
    create = create_sliding_window_causal_mask if _has_window(backbone.config, index) else create_causal_mask
    place = {} if cache is None else {"layer_idx": index}
    return {
        "attention_mask": create(backbone.config, hidden, seen.to(hidden.device).long(), cache, **place),
        "position_embeddings": backbone.rotary_emb(hidden, position_ids=positions.to(hidden.device)),
        # Positions with gaps would look like several packed sequences to flash-attn; no layer uses them but for that.
        "position_ids": None,
    }


def _has_window(config: Any, index: int) -> bool:
    """Say whether a layer attends to a sliding window; Qwen2's first layers need not, Mistral's all do."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None if kinds is None else kinds[index] != "full_attention"

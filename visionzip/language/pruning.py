"""Pruning inside a language model: what FastV and SparseVLM share.

Both methods look at the attention that visual tokens get in a layer, keep those of most attention, and let the layers
after it see only these. Here that is done by hooks on one model's layers: a hook before the scored layer computes the
rows of attention that are needed from that layer's own queries and keys, a hook before the next one shortens what it
gets, and from then on each layer is given the mask and positions of what it sees. All layers keep their attention
kernel, the KV cache of each layer holds what that layer has seen, and no class is modified. What a conversation's
layers have seen is kept on its cache: batches, beams and threads do not disturb each other.
"""

from __future__ import annotations

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
from visionzip.config import VisionZipConfig
from visionzip.integrations import find_integration, llava
from visionzip.language.selection import Keep, attention_received, keep_top, number_to_keep
from visionzip.methods import has_size_bias

Model = TypeVar("Model", bound=nn.Module)

_HANDLES = "_visionzip_pruning"  # attribute of the model: the hooks that are attached
_STAGES = "_visionzip_stages"  # attribute of a KV cache: what its later layers have seen of the prompt
_PROMPT = "visionzip_prompt"  # argument that the hooks hand from the backbone to its layers


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
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)  # by a stage's first layer: masks, positions


def attach_pruning(model: Model, pruning: Pruning) -> Model:
    """Put a method's hooks on a model, in the place of any that are there.

    Raises:
        TypeError: the model is of no supported family, or has no language model.
        ValueError: a layer or a number to keep is outside its limits, the model is one of transformers, or it is zipped
            with a size bias.
    """
    target = unwrap(model)
    refuse_transformers(target)
    if not hasattr(target, "get_model"):
        raise TypeError(f"{type(target).__name__} is no language model: give the LLaVA model, not its vision tower")
    backbone = target.get_model()
    _check(pruning, len(backbone.layers))
    if (stored := getattr(target.config, "visionzip", None)) and has_size_bias(VisionZipConfig.from_dict(stored)):
        raise ValueError(
            "this model is zipped with size_bias, which does not go with pruning inside its language model: call "
            "visionzip(model, …, size_bias=False) or unzip(model) first"
        )
    remove_pruning(model)
    handles = [
        target.register_forward_pre_hook(_refuse_labels, with_kwargs=True),
        backbone.register_forward_pre_hook(partial(_before_backbone, pruning), with_kwargs=True),
    ]
    handles += [
        layer.register_forward_pre_hook(partial(_before_layer, pruning, backbone, index), with_kwargs=True)
        for index, layer in enumerate(backbone.layers)
    ]
    setattr(target, _HANDLES, handles)
    return model


def refuse_transformers(model: nn.Module) -> None:
    """Check that a model is of this repository's classes, whose language models FastV and SparseVLM know.

    Raises:
        TypeError: it is of no supported family.
        ValueError: it is one of transformers' LLaVA models.
    """
    if find_integration(model).attach is not llava.attach:
        raise ValueError(
            f"{type(model).__name__} is a model of transformers, on which FastV and SparseVLM do not run: convert its "
            "checkpoint (visionzip convert SRC DST --to original)"
        )


def is_pruned(model: nn.Module) -> bool:
    """Whether a method's hooks are on a model."""
    return _HANDLES in vars(unwrap(model))


def remove_pruning(model: Model) -> Model:
    """Undo :func:`fastv` or :func:`sparsevlm`: the model answers as before; without either, nothing happens.

    A conversation that goes on with the KV cache of a pruned prompt needs the method that has pruned it.
    """
    for handle in unwrap(model).__dict__.pop(_HANDLES, []):
        handle.remove()
    return model


def seen_of_prompt(cache: Cache) -> list[Stage]:
    """What the layers of a KV cache have seen of its prompt, one :class:`Stage` for each time that it was pruned."""
    return list(getattr(cache, _STAGES, []))


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


def _before_backbone(
    pruning: Pruning, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Say what kind of forward this is: a prompt to prune, what follows one that was pruned, or neither."""
    cache, visual, embeds = kwargs.get("past_key_values"), kwargs.get("visual_mask"), kwargs.get("inputs_embeds")
    past = 0 if cache is None else cache.get_seq_length()
    mask = kwargs.get("attention_mask")
    fresh = visual is not None and embeds is not None and visual.shape[1] == embeds.shape[1] and bool(visual.any())
    if past:
        if fresh:
            raise ValueError(
                "visual tokens follow a KV cache, but they are pruned with their whole prompt only: give the "
                "conversation from its beginning, without past_key_values"
            )
        if stages := seen_of_prompt(cache):
            return args, {**kwargs, _PROMPT: _Pass(mask, stages, prefill=False)}
        return None
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
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: pruning needs (B, L), 0 for padding")
    if cache is not None and not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(f"pruning needs a KV cache that grows (DynamicCache), not {type(cache).__name__}")
    real = torch.ones_like(visual) if mask is None else mask.bool()
    visual = visual & real
    rows = zip(embeds, visual, real, strict=True)
    queries = torch.stack([pruning.queries(*row) for row in rows])
    slots = torch.arange(length, device=visual.device).expand(batch, -1)
    whole = Stage(0, length, slots, real, visual, queries, slots, slots[:, :1] * 0)
    return args, {**kwargs, _PROMPT: _Pass(mask, [whole], prefill=True, visual=visual.sum(dim=1))}


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
        if stage.layer not in current.arguments:
            current.arguments[stage.layer] = _arguments(backbone, current, stage, hidden, cache, kwargs)
        kwargs = {**kwargs, **current.arguments[stage.layer]}
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
    backbone: nn.Module, current: _Pass, stage: Stage, hidden: Tensor, cache: Cache | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Mask and positions of the layers from a stage's first on, as the backbone computes those of the whole prompt."""
    if current.prefill:
        positions, cache, seen = stage.positions, None, stage.real
    else:
        positions = kwargs["position_ids"] - stage.shift
        length = cache.get_seq_length(stage.layer) + hidden.shape[1] - stage.real.shape[1]
        later = stage.real.new_ones(len(hidden), length)
        if current.attention_mask is not None:
            later = current.attention_mask[:, stage.length :].to(later)
        seen = torch.cat([stage.real, later], dim=1)
    config = backbone.config
    windowed = getattr(config, "sliding_window", None) is not None
    create = create_sliding_window_causal_mask if windowed else create_causal_mask
    place = {} if cache is None else {"layer_idx": stage.layer}
    return {
        "attention_mask": create(config, hidden, seen.to(hidden.device).long(), cache, **place),
        "position_embeddings": backbone.rotary_emb(hidden, position_ids=positions.to(hidden.device)),
        # Positions with gaps would look like several packed sequences to flash-attn; no layer uses them but for that.
        "position_ids": None,
    }

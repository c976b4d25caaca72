"""Prune a prompt's visual tokens layer by layer: hooks on a language model's forward, and a record of what they keep.

A forward of the language model is a :class:`Pass`. Before the scored layer, a hook computes the needed rows of
attention from that layer's own queries and keys; before the next layer, one shortens the hidden states, which begins a
new :class:`Stage`; from there on, each layer is given the mask and positions of its stage. The stages of a prompt lie
on its KV cache, where decoding and later text find them: batches, beams and threads do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from visionzip.language.selection import Keep, attention_received, keep_top, number_to_keep

_STAGES = "_visionzip_stages"  # attribute of a KV cache: the stages of its prompt
_PASS = "visionzip_pass"  # argument that the backbone hands on to its layers


@dataclass(frozen=True)
class Pruning:
    """Say how one method prunes.

    Attributes:
        keep: by scored layer (0 is the first), how many visual tokens of a prompt the next layer gets: a number, or a
            fraction of the prompt's.
        queries: picks the tokens whose attention is the score: from one prompt's embeddings (L, D), its mask of visual
            tokens (L,) and its mask of tokens that are not padding (L,) to a mask (L,).
        recycle: merges dropped tokens (n, D), given their scores (n,), into fewer (m, D); None drops them.
        renumber: gives the shortened prompt consecutive positions; else tokens keep the positions that they had.
    """

    keep: Mapping[int, Keep]
    queries: Callable[[Tensor, Tensor, Tensor], Tensor]
    recycle: Callable[[Tensor, Tensor], Tensor] | None = None
    renumber: bool = False


@dataclass
class Stage:
    """Describe the prompts as the layers from one on see them: B rows of S tokens, fewer than the prompts' L.

    Attributes:
        layer: the first of these layers.
        length: L.
        kept: (B, S) index in the prompt (0 to L - 1) of each token; -1 for recycled ones and padding.
        real: (B, S) false for padding, the prompt's own and that of rows that keep fewer tokens than another.
        visual: (B, S) true for visual tokens, recycled ones too.
        queries: (B, S) true for the tokens whose attention is the score.
        positions: (B, S) position ids.
        shift: (B, 1) how much lower the positions of later tokens are than in the first layer.
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
class Pass:
    """Hold what the layers tell each other in one forward of the backbone.

    Attributes:
        attention_mask: (B, P + L) as the backbone is given it, or None.
        stages: those so far, in the order of their layers; of a prefill, the first is the whole prompt.
        prefill: whether this is the prompt, which is pruned, or text behind it.
        visual: (B,) how many visual tokens each prompt has; None behind it.
        scores: (B, S) of the layer before, until the next one shortens by them.
        arguments: masks and positions, by a stage's first layer and whether attention has a sliding window.
    """

    attention_mask: Tensor | None
    stages: list[Stage]
    prefill: bool
    visual: Tensor | None = None
    scores: Tensor | None = None
    arguments: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)


def seen_of_prompt(cache: Cache) -> list[Stage]:
    """Read off a KV cache how its prompt was pruned: one :class:`Stage` for each cut, none if it was not."""
    return list(getattr(cache, _STAGES, []))


def before_backbone(
    pruning: Pruning, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Start a :class:`Pass` for a prompt to prune, or for text behind a pruned one: forward pre-hook of the backbone.

    Raises:
        ValueError: the prompt, its mask or its cache cannot be pruned.
    """
    visual = kwargs.pop("visual_mask", None)  # the layers do not know it
    if (current := _new_pass(pruning, backbone, visual, kwargs)) is not None:
        kwargs[_PASS] = current
    return args, kwargs


def _new_pass(pruning: Pruning, backbone: nn.Module, visual: Tensor | None, kwargs: dict[str, Any]) -> Pass | None:
    """Tell a prompt to prune from text behind a pruned one and from any other forward, for which there is None."""
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
        return Pass(mask, stages, prefill=False) if stages else None
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
    return Pass(mask, [whole], prefill=True, visual=visual.sum(dim=1))


def before_layer(
    pruning: Pruning, backbone: nn.Module, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Shorten a layer's input behind a scored layer, pass its stage's mask on, and score it: its forward pre-hook."""
    if (current := kwargs.pop(_PASS, None)) is None:
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


def _shorten(pruning: Pruning, current: Pass, index: int, hidden: Tensor) -> Tensor:
    """Cut hidden states (B, S, D) to the tokens of highest score and recycled ones, and add the stage that begins."""
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
        shift = before.shift + _last(before.positions, before.real) - _last(positions, real)
    hidden = padded.pop("hidden")
    current.stages.append(Stage(index, before.length, positions=positions, shift=shift, **padded))
    return hidden


def _last(positions: Tensor, real: Tensor) -> Tensor:
    """Find each prompt's highest position (B, 1)."""
    return positions.masked_fill(~real, 0).amax(dim=1, keepdim=True)


def _arguments(
    backbone: nn.Module, current: Pass, stage: Stage, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Make a stage's mask and positions for its layer ``index``, as the backbone does for the whole prompt."""
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
    """Say whether a layer attends to a sliding window, as all of Mistral's may, or the last ones of Qwen2's."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None if kinds is None else kinds[index] != "full_attention"

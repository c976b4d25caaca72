"""Prune a prompt's visual tokens layer by layer: hooks on a language model's forward, and a record of what they keep.

One forward of the language model is a :class:`Pass`. A hook before the scored layer computes the rows of attention that
are needed, from that layer's own queries and keys. A hook before the next layer shortens the hidden states by these
scores, which begins a new :class:`Stage`; that layer and all later ones get the mask and positions of their stage. The
stages of a prompt are kept on its KV cache, where decoding and later text find them, so that batches, beams and threads
do not disturb each other.
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

_STAGES = "_visionzip_stages"  # attribute of a KV cache that holds the stages of its prompt
_PASS = "visionzip_pass"  # name of the argument by which the backbone passes a Pass on to its layers


@dataclass(frozen=True)
class Pruning:
    """How a method prunes.

    Attributes:
        keep: for each scored layer (0 is the first), how many visual tokens of a prompt the next layer gets: a number,
            or a fraction of the prompt's visual tokens.
        queries: picks the tokens whose attention is the score; a function of one prompt's embeddings (L, D), its mask
            of visual tokens (L,) and its mask of tokens that are not padding (L,), which returns a mask (L,).
        recycle: merges dropped tokens (n, D) with the scores (n,) into fewer tokens (m, D); None drops them.
        renumber: whether the shortened prompt gets consecutive positions; otherwise tokens keep their positions.
    """

    keep: Mapping[int, Keep]
    queries: Callable[[Tensor, Tensor, Tensor], Tensor]
    recycle: Callable[[Tensor, Tensor], Tensor] | None = None
    renumber: bool = False


@dataclass
class Stage:
    """The prompts as a layer and those after it see them, until the next cut: B rows of S of the prompts' L tokens.

    Attributes:
        layer: the first layer that sees them so.
        length: L, the length of the prompts.
        kept: (B, S), the index of each token in the prompt (0 to L - 1); -1 for recycled tokens and padding.
        real: (B, S), false for padding, which is the prompt's own or that of rows that keep fewer tokens than others.
        visual: (B, S), true for visual tokens, including recycled ones.
        queries: (B, S), true for the tokens whose attention is the score.
        positions: (B, S), the position ids.
        shift: (B, 1), by how much the positions of later tokens are lower than in the first layer.
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
    """What the hooks of the layers pass on to each other during one forward of the backbone.

    Attributes:
        attention_mask: (B, P + L), the backbone's own argument, or None.
        stages: the stages so far, in the order of their layers; in a prefill, the first one is the whole prompt.
        prefill: whether this forward is of the prompt, which is pruned, and not of text that follows it.
        visual: how many visual tokens each prompt has; empty if this is no prefill.
        scores: (B, S), the scores that a layer has computed, until the next layer shortens by them.
        arguments: masks and positions that were made already, by a stage's first layer and whether the layer's
            attention has a sliding window.
    """

    attention_mask: Tensor | None
    stages: list[Stage]
    prefill: bool
    visual: list[int] = field(default_factory=list)
    scores: Tensor | None = None
    arguments: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)


def seen_of_prompt(cache: Cache) -> list[Stage]:
    """List the stages of the prompt that a KV cache holds, one for each cut; none if the prompt was not pruned."""
    return list(getattr(cache, _STAGES, []))


def before_backbone(
    pruning: Pruning, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Start a :class:`Pass` for a prompt to prune, or for text that follows one; a forward pre-hook of the backbone.

    Raises:
        ValueError: the prompt cannot be pruned, or not with this mask or this cache.
    """
    visual = kwargs.pop("visual_mask", None)  # the layers do not take it
    if (current := _new_pass(pruning, backbone, visual, kwargs)) is not None:
        kwargs[_PASS] = current
    return args, kwargs


def _new_pass(pruning: Pruning, backbone: nn.Module, visual: Tensor | None, kwargs: dict[str, Any]) -> Pass | None:
    """Tell three kinds of forward apart: a prompt to prune, text that follows one, and any other, which gets None."""
    cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
    has_visual = visual is not None and bool(visual.any())
    fits = visual is not None and embeds is not None and visual.shape[1] == embeds.shape[1]
    if cache is not None and cache.get_seq_length():
        if has_visual and fits:
            raise ValueError(
                "visual tokens follow a KV cache, but they are pruned with their whole prompt only: give the "
                "conversation from its beginning, without past_key_values"
            )
        stages = seen_of_prompt(cache)
        return Pass(kwargs.get("attention_mask"), stages, prefill=False) if stages else None
    if cache is not None:
        cache.__dict__.pop(_STAGES, None)  # it may have the stages of a prompt before cache.reset()
    if visual is None or not has_visual:
        return None
    if embeds is None or not fits:
        raise ValueError(
            f"visual_mask is for {visual.shape[1]} tokens, but the forward without a KV cache has others: generate "
            "with use_cache=True and without chunks"
        )
    return _prefill_pass(pruning, backbone, visual, embeds, kwargs)


def _prefill_pass(
    pruning: Pruning, backbone: nn.Module, visual: Tensor, embeds: Tensor, kwargs: dict[str, Any]
) -> Pass:
    """Start the pass of prompts with embeddings (B, L, D) and visual tokens (B, L); the first stage has all tokens."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
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
    queries = torch.stack([pruning.queries(*row) for row in zip(embeds, visual, real, strict=True)])
    slots = torch.arange(length, device=visual.device).expand(batch, -1)
    whole = Stage(0, length, slots, real, visual, queries, slots, slots[:, :1] * 0)
    return Pass(mask, [whole], prefill=True, visual=visual.sum(dim=1).tolist())


def before_layer(
    pruning: Pruning, backbone: nn.Module, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Do what one layer needs, as its forward pre-hook.

    If the layer before was scored, the layer's input is shortened by these scores. The layer then gets the mask and
    positions of its stage. If it is a scored layer itself, its scores are computed.
    """
    if (current := kwargs.pop(_PASS, None)) is None:
        return None
    hidden, cache = args[0], kwargs.get("past_key_values")
    if current.prefill:
        if index == 0:  # the backbone has made the prompt's positions by now
            current.stages[0].positions = kwargs["position_ids"].expand(len(hidden), -1)
        if current.scores is not None:
            hidden = _shorten(pruning, current, index, hidden, current.scores)
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


def _shorten(pruning: Pruning, current: Pass, index: int, hidden: Tensor, scores: Tensor) -> Tensor:
    """Cut hidden states (B, S, D) to the tokens of highest score and recycled ones, and add the stage that begins."""
    current.scores, before, keep = None, current.stages[-1], pruning.keep[index - 1]
    numbers = [number_to_keep(keep, visual) for visual in current.visual]
    chosen = torch.stack([keep_top(*row) for row in zip(scores, before.visual, numbers, strict=True)])
    dropped = before.visual & ~chosen
    if not dropped.any():
        return hidden
    merged = [states[:0] for states in hidden]
    if pruning.recycle is not None:
        for row, out in enumerate(dropped):
            if out.any():
                merged[row] = pruning.recycle(hidden[row, out.to(hidden.device)], scores[row, out])
    hidden, stage = _cut(hidden, before, index, dropped, merged)
    if pruning.renumber:
        first = before.positions.gather(1, before.real.long().argmax(dim=1, keepdim=True))
        stage.positions = (first + stage.real.cumsum(dim=1) - 1).clamp(min=0)
        stage.shift = before.shift + _last(before.positions, before.real) - _last(stage.positions, stage.real)
    current.stages.append(stage)
    return hidden


def _cut(hidden: Tensor, before: Stage, layer: int, dropped: Tensor, merged: list[Tensor]) -> tuple[Tensor, Stage]:
    """Take the dropped tokens (B, S) out of all rows, and put each row's merged tokens (m, D) into them.

    Merged tokens come after the row's visual tokens and before the text that follows these. Rows that become shorter
    than others are padded on the left.

    Returns:
        The hidden states (B, S', D), and the stage that begins at ``layer``.
    """
    ends = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in before.visual]

    def cut(values: Tensor, of_merged: list[Tensor], padding: float) -> Tensor:
        stays = ~dropped.to(values.device)
        rows = [
            torch.cat([values[row, :end][stays[row, :end]], of_merged[row], values[row, end:][stays[row, end:]]])
            for row, end in enumerate(ends)
        ]
        return pad_sequence(rows, batch_first=True, padding_side="left", padding_value=padding)

    def cut_field(values: Tensor, of_merged: int, padding: int) -> Tensor:
        return cut(values, [values.new_full((len(states),), of_merged) for states in merged], padding)

    stage = Stage(
        layer,
        before.length,
        kept=cut_field(before.kept, -1, -1),
        real=cut_field(before.real, True, False),
        visual=cut_field(before.visual, True, False),
        queries=cut_field(before.queries, False, False),
        positions=cut_field(before.positions, 0, 0),
        shift=before.shift,
    )
    return cut(hidden, merged, 0.0), stage


def _last(positions: Tensor, real: Tensor) -> Tensor:
    """Find each prompt's highest position (B, 1)."""
    return positions.masked_fill(~real, 0).amax(dim=1, keepdim=True)


def _arguments(
    backbone: nn.Module, current: Pass, stage: Stage, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Make the mask and positions of a stage for layer ``index``, as the backbone makes them for the whole prompt."""
    cache: Any = kwargs.get("past_key_values")
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
        # Layers use position_ids only to find packed sequences for flash-attn, which gaps would look like.
        "position_ids": None,
    }


def _has_window(config: Any, index: int) -> bool:
    """Say whether a layer attends to a sliding window, as all layers of Mistral may, or the last ones of Qwen2."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None if kinds is None else kinds[index] != "full_attention"

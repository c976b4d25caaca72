"""Shortens the runs of placeholders that transformers' processors write for images and videos.

A stock processor writes one placeholder for each visual token of the model as it is (576 for an image of LLaVA-1.5).
A zipped model has fewer, so as many placeholders have to go, in everything that runs along with the ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from visionzip.integrations.held import Held

# What fills padding, in each argument that has an entry for every token.
_FILL = {"input_ids": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


class Run(NamedTuple):
    """Placeholders of one image or video: as the stock processor writes them, and visual tokens of the zipped model."""

    full: int
    short: int


@dataclass(frozen=True)
class Visual:
    """All images, or all videos, of a batch, in the order of the prompts.

    Attributes:
        modality: ``"image"`` or ``"video"``, for messages.
        token_id: id of its placeholder.
        runs: one each.
    """

    modality: str
    token_id: int
    runs: Sequence[Run]


class Edit(NamedTuple):
    """One image's or video's run in a prompt: where it starts, and how long it is and will be."""

    start: int
    full: int
    short: int
    modality: str
    index: int


def find_runs(input_ids: Tensor, visuals: Iterable[Visual]) -> list[list[Edit]]:
    """Which placeholders belong to which image: per row, in order, exactly the runs that the stock processor writes.

    Args:
        input_ids: (B, L) prompts.
        visuals: what the model is given.

    Returns:
        The runs of each row, in order.

    Raises:
        ValueError: there is no prompt; a run is not made of whole images, or there are more or fewer than images. The
            message names row and image, both lengths and what to do.
    """
    if input_ids.ndim != 2 or not len(input_ids):
        raise ValueError(f"input_ids must be (B, L) with B >= 1, got {tuple(input_ids.shape)}")
    edits: list[list[Edit]] = [[] for _ in input_ids]
    for visual in visuals:
        used = 0
        for row, prompt in enumerate((input_ids == visual.token_id).cpu()):  # one transfer, not one per run
            for start, length in stretches(prompt):
                own = _split_run(start, length, visual, used, row)
                used += len(own)
                edits[row] += own
        if used < len(visual.runs):
            kind = visual.modality
            raise ValueError(
                f"the prompts have placeholders (id {visual.token_id}) for {used} of {len(visual.runs)} {kind}s: give "
                f"as many {kind}s as the prompts have <{kind}>, in order, from the model's own processor (another's "
                "placeholders may have another id)"
            )
    return [sorted(row) for row in edits]


def stretches(mask: Tensor) -> list[tuple[int, int]]:
    """Start and length of each stretch of true values in a mask (L,)."""
    steps = torch.diff(mask.int(), prepend=mask.new_zeros(1).int(), append=mask.new_zeros(1).int())
    starts, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def _split_run(start: int, length: int, visual: Visual, used: int, row: int) -> list[Edit]:
    """The images of one stretch: images side by side in a prompt make one."""
    edits, end = [], start + length
    while start < end:
        index = used + len(edits)
        if index == len(visual.runs) and not edits:
            raise ValueError(
                f"prompt {row} has more runs of {visual.modality} placeholders (id {visual.token_id}) than there are "
                f"{visual.modality}s: {len(visual.runs)} were given. Give as many as the prompts have "
                f"<{visual.modality}>, in order"
            )
        if index == len(visual.runs) or visual.runs[index].full > end - start:
            lengths = [run.full for run in visual.runs[used : index + 1]]
            raise ValueError(
                f"prompt {row} has a run of {length} {visual.modality} placeholders (id {visual.token_id}) where this "
                f"model takes {' + '.join(map(str, lengths))} ({visual.modality} {used} of the batch"
                f"{' and following' if len(lengths) > 1 else ''}): either the processor cut the prompt (do not "
                "truncate it, or raise max_length), or it is of another model (patch_size, "
                "num_additional_image_tokens, vision_feature_select_strategy and the image processor's size must be "
                f"this model's), or {visual.modality}s are missing"
            )
        edits.append(Edit(start, *visual.runs[index], visual.modality, index))
        start += visual.runs[index].full
    return edits


class Shortened(NamedTuple):
    """Prompts with shortened runs.

    Attributes:
        arguments: those of the model that run along with the tokens, as far as they were given (an ``attention_mask``
            in any case where rows differ in length), with L' for L.
        new: the runs that are not in the cache yet; all of them without one.
        held: what a cache holds that was given these prompts.
        edits: of :func:`find_runs`.
        columns: of each row without padding, where in the prompts its tokens are.
        index: (B, L') which of these each token is, -1 for padding and for what is in the cache.
    """

    arguments: dict[str, Tensor]
    new: list[Edit]
    held: Held
    edits: list[list[Edit]]
    columns: list[Tensor]
    index: Tensor

    def spread(self, values: Mapping[tuple[str, int], Tensor], others: float | None, fill: float) -> Tensor:
        """Values (B, L') of all tokens, from those (T,) of the tokens of each run, by modality and number.

        Args:
            values: runs that are left out are as text.
            others: the value of text; if None, its column, to which a run's values are then relative.
            fill: of padding and what is in the cache.
        """
        rows = []
        for edits, columns in zip(self.edits, self.columns, strict=True):
            row = columns.clone() if others is None else torch.full(columns.shape, others)
            dropped = 0
            for edit in edits:
                start = edit.start - int(columns[0]) - dropped
                if (own := values.get((edit.modality, edit.index))) is not None:
                    row[start : start + edit.short] = own.to(row) + (edit.start if others is None else 0)
                dropped += edit.full - edit.short
            rows.append(row)
        return _look_up(rows, self.index, fill)


def shorten(
    arguments: Mapping[str, Any],
    edits: list[list[Edit]],
    pad_token_id: int | None,
    side: str | None = None,
    past: int = 0,
    held: Held | None = None,
) -> Shortened:
    """Prompts with runs as long as the zipped model's visual tokens.

    Rows lose their padding and are padded anew to the longest of them, each on the side where it was, and otherwise on
    the side of the others or the left, so that ``logits[:, -1]`` is still each row's next token. With a cache, what it
    holds stays where it is there, and what is new is padded on its own behind that.

    Args:
        arguments: ``input_ids`` (B, L) and, if given, ``attention_mask`` (B, P + L) with P positions of a cache,
            ``labels``, ``token_type_ids``, ``mm_token_type_ids`` and ``position_ids`` (B, L). Others are left out.
        edits: of :func:`find_runs`.
        pad_token_id: id for padding; 0 if None.
        side: ``"left"`` or ``"right"`` for all rows.
        past: tokens in the cache with which the prompts begin, where they do; then with a mask and without
            ``position_ids``.
        held: which tokens these are; if None, the prompts must say it.

    Raises:
        ValueError: an argument has another shape, or the cache is not one of these prompts.
    """
    ids = arguments["input_ids"]
    given = {name: arguments[name] for name in (*_FILL, "position_ids") if arguments.get(name) is not None}
    mask = arguments.get("attention_mask")
    _check_shapes(ids, given, mask)
    keep = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].to(ids.device)
    kept = keep.bool().cpu()
    bounds = [_content(row, own) for row, own in zip(kept, edits, strict=True)]
    sources = [_sources(row, *bound) for row, bound in zip(edits, bounds, strict=True)]
    sides = _sides(bounds, ids.shape[1], side)
    cached = _cached(sources, edits, past, held) if past else Held(torch.empty(len(ids), 0).long(), 0)
    column = cached.length
    order = _pad([torch.arange(len(row))[row >= column] for row in sources], sides)
    index = torch.cat([cached.columns, _look_up(sources, order, -1)], dim=1)

    def pick(values: Tensor, fill: int) -> Tensor:
        own = index.to(values.device)
        return values.gather(1, own.clamp(min=0)).masked_fill(own < 0, fill)

    fills = {**_FILL, "input_ids": pad_token_id or 0}
    new = {name: pick(values, fills[name]) for name, values in given.items() if name != "position_ids"}
    if "position_ids" in given:
        new["position_ids"] = _positions(given["position_ids"].expand_as(ids), index)
    if mask is not None or (index < 0).any():
        new_mask = pick(keep, 0)
        before = new_mask.new_ones(len(ids), 0) if mask is None else mask[:, : -ids.shape[1]]
        new["attention_mask"] = torch.cat([before.to(new_mask), new_mask], dim=1).to(keep if mask is None else mask)
    still = [edit for row in edits for edit in row if edit.start >= column]
    starts = torch.stack([row[0] for row in sources])[:, None]
    now = Held(index.masked_fill(index < starts, -1), ids.shape[1])
    order = torch.cat([torch.full_like(cached.columns, -1), order], dim=1)
    return Shortened(new, still, now, edits, sources, order)


def _look_up(rows: list[Tensor], index: Tensor, fill: float) -> Tensor:
    """Values (B, L') of rows (n,) of different length by index, -1 for padding."""
    values = pad_sequence(rows, batch_first=True)
    return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, fill)


def _cached(sources: list[Tensor], edits: list[list[Edit]], past: int, held: Held | None) -> Held:
    """What a cache of ``past`` tokens holds of the prompts (B, L).

    Raises:
        ValueError: nothing is new, the cache ends inside an image, or its padding is another one or not known.
    """
    if held is None or len(sources) == 1:  # no padding then, so it may be another one now
        held = _infer_held(sources, edits, past)
    cached = held.grown(past)
    for row, (columns, source) in enumerate(zip(held.columns, sources, strict=True)):
        if len(real := columns[columns >= 0]) and real[0] != source[0]:
            raise ValueError(
                f"prompt {row} begins in column {int(source[0])}, and when past_key_values was filled it began in "
                f"{int(real[0])}: put new tokens behind the sequences that generate returned, or leave "
                "past_key_values out"
            )
    if all(int(row[-1]) < cached.length for row in sources):
        raise ValueError(
            f"past_key_values holds {past} tokens, and the prompt has {max(map(len, sources))} when zipped, so nothing "
            "in it is new. Give the whole conversation with all its images, or the new tokens alone with an "
            "attention_mask that covers the cache too"
        )
    for edit in (edit for row in edits for edit in row):
        if edit.start < cached.length < edit.start + edit.full:
            raise ValueError(
                f"past_key_values holds {past} tokens, which ends inside {edit.modality} {edit.index}: it is of "
                "another conversation, or of one that was not zipped"
            )
    return cached


def _infer_held(sources: list[Tensor], edits: list[list[Edit]], past: int) -> Held:
    """The same of a cache that was filled by other means than ``generate``, which holds text alone or no padding."""
    ends = {int(row[past]) if len(row) > past else int(row[-1]) + 1 for row in sources}
    if len(ends) == 1 and len({min(len(row), past) for row in sources}) == 1:
        return Held(torch.stack([row[:past] for row in sources]), ends.pop())
    if any(edit.start < past for row in edits for edit in row):
        raise ValueError(
            f"past_key_values holds {past} tokens of each prompt, but not which ones are padding: with prompts of "
            "several lengths give a cache that this model's generate has filled, or the new tokens alone with an "
            "attention_mask that covers the cache too"
        )
    return Held(torch.empty(len(sources), 0).long(), 0)


def _check_shapes(ids: Tensor, given: Mapping[str, Tensor], mask: Tensor | None) -> None:
    shape = None if mask is None else tuple(getattr(mask, "shape", (type(mask).__name__,)))
    if shape is not None and (len(shape) != 2 or shape[0] != ids.shape[0] or shape[1] < ids.shape[1]):
        raise ValueError(
            f"attention_mask has shape {shape} for prompts of {tuple(ids.shape)}: a zipped model takes "
            "(B, L), or (B, past + L) with a cache"
        )
    for name, values in given.items():
        if tuple(values.shape) not in (tuple(ids.shape), (1, ids.shape[1])[: 2 * (name == "position_ids")]):
            raise ValueError(f"{name} has shape {tuple(values.shape)}, but the prompts have {tuple(ids.shape)}")


def _content(keep: Tensor, edits: list[Edit]) -> tuple[int, int]:
    """Start and end of a prompt without the padding around it; a mask (L,) of zeros alone is taken as a prompt."""
    kept = keep.nonzero().flatten()
    if not len(kept):
        return 0, len(keep)
    # Images that are masked are no padding.
    starts, ends = [edit.start for edit in edits], [edit.start + edit.full for edit in edits]
    return min([int(kept[0]), *starts]), max([int(kept[-1]) + 1, *ends])


def _sources(edits: list[Edit], start: int, end: int) -> Tensor:
    """For each token of the shortened prompt, its position in the long one."""
    pieces = []
    for edit in edits:
        pieces.append(torch.arange(start, edit.start))
        # A budget of the whole sequence may need more placeholders than there were: the last one is repeated.
        run = torch.arange(edit.short).clamp(max=edit.full - 1)
        pieces.append(edit.start + run)
        start = edit.start + edit.full
    return torch.cat([*pieces, torch.arange(start, max(start, end))])


def _sides(bounds: list[tuple[int, int]], length: int, side: str | None) -> list[str]:
    found = ["left" if start else "right" if end < length else None for start, end in bounds]
    others = next(filter(None, found), "left")
    return [side or own or others for own in found]


def _pad(rows: list[Tensor], sides: list[str]) -> Tensor:
    """Rows of positions as (B, longest), -1 for padding."""
    longest = rows[0].new_empty(max(map(len, rows)))
    padded = [
        pad_sequence([row, longest], batch_first=True, padding_value=-1, padding_side=side)[0]
        for row, side in zip(rows, sides, strict=True)
    ]
    return torch.stack(padded)


def _positions(positions: Tensor, index: Tensor) -> Tensor:
    """Position ids (B, L') that are consecutive again, from the first token and from wherever they started anew."""
    index = index.to(positions.device)
    real = index >= 0
    places = torch.arange(index.shape[1], device=index.device).expand_as(index)
    own = positions.gather(1, index.clamp(min=0))
    before = positions.gather(1, (index - 1).clamp(min=0))
    first = real & (real.cumsum(1) == 1)
    anew = first | (real & (own != before + 1) & (index > 0))
    start = torch.where(anew, places, -1).cummax(1).values.clamp(min=0)
    return (own.gather(1, start) + places - start).masked_fill(~real, 0)

"""Shortens the runs of placeholders that transformers' processors write for images and videos.

A stock processor writes one placeholder for each visual token of the model as it is (576 for an image of LLaVA-1.5).
A zipped model has fewer, so as many placeholders have to go, in everything that runs along with the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from visionzip.integrations.held import Held, cached_tokens
from visionzip.integrations.runs import Edit

# What fills padding, in each argument that has an entry for every token.
_FILL = {"input_ids": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


class Shortened(NamedTuple):
    """Prompts with shortened runs.

    Attributes:
        arguments: those of the model that run along with the tokens, as far as they were given (an ``attention_mask``
            in any case where rows differ in length), with L' for L.
        new: the runs that are not in the cache yet; all of them without one.
        held: what a cache holds that was given these prompts.
        edits: of :func:`~visionzip.integrations.runs.find_runs`, as long as they are now.
        columns: of each row without padding, where in the prompts its tokens are.
        order: (B, L') which entry of ``columns`` each token is, -1 for padding and for what is in the cache.
    """

    arguments: dict[str, Tensor]
    new: list[Edit]
    held: Held
    edits: list[list[Edit]]
    columns: list[Tensor]
    order: Tensor

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
                short = edit.short or 0
                if (own := values.get(edit.key)) is not None:
                    row[start : start + short] = own.to(row) + (edit.start if others is None else 0)
                dropped += edit.full - short
            rows.append(row)
        return _look_up(rows, self.order, fill)


class Plan(NamedTuple):
    """How prompts are shortened, as far as it follows from shapes: all but which placeholders of a run stay.

    Attributes:
        edits: of :func:`~visionzip.integrations.runs.find_runs`.
        bounds: start and end of each prompt without its padding.
        sides: on which each is padded.
        cached: what the given cache holds of the prompts.
    """

    edits: list[list[Edit]]
    bounds: list[tuple[int, int]]
    sides: list[str]
    cached: Held

    @property
    def new(self) -> list[Edit]:
        """The runs that are not in the cache yet; all of them without one."""
        return [edit for row in self.edits for edit in row if edit.start >= self.cached.length]


def plan_prompts(
    arguments: Mapping[str, Any],
    edits: list[list[Edit]],
    side: str | None = None,
    past: int = 0,
    held: Held | None = None,
) -> Plan:
    """How prompts are shortened, before any encoder has run.

    Args:
        arguments: as of :func:`shorten`.
        edits: of :func:`~visionzip.integrations.runs.find_runs`.
        side: ``"left"`` or ``"right"`` for all rows.
        past: tokens in the cache with which the prompts begin, where they do; then with a mask and without
            ``position_ids``.
        held: which tokens these are; if None, the prompts must say it.

    Raises:
        ValueError: an argument has another shape, or the cache is not one of these prompts.
    """
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    _check_shapes(ids, _given(arguments), mask)
    kept = _kept(ids, mask).bool().cpu()
    bounds = [_content(row, own) for row, own in zip(kept, edits, strict=True)]
    sides = _sides(bounds, ids.shape[1], side)
    if not past:
        return Plan(edits, bounds, sides, Held(torch.empty(len(ids), 0).long(), 0))
    sources = [_sources(row, {}, *bound) for row, bound in zip(edits, bounds, strict=True)]
    return Plan(edits, bounds, sides, cached_tokens(sources, edits, past, held))


def shorten(
    arguments: Mapping[str, Any],
    plan: Plan,
    pad_token_id: int | None,
    stay: Mapping[tuple[str, int], Tensor] | None = None,
) -> Shortened:
    """Prompts with runs as long as the zipped model's visual tokens.

    Rows lose their padding and are padded anew to the longest of them, each on the side where it was, and otherwise on
    the side of the others or the left, so that ``logits[:, -1]`` is still each row's next token. With a cache, what it
    holds stays where it is there, and what is new is padded on its own behind that.

    Args:
        arguments: ``input_ids`` (B, L) and, if given, ``attention_mask`` (B, P + L) with P positions of a cache,
            ``labels``, ``token_type_ids``, ``mm_token_type_ids`` and ``position_ids`` (B, L). Others are left out.
        plan: of :func:`plan_prompts`, of the same arguments.
        pad_token_id: id for padding; 0 if None.
        stay: of runs by modality and number, ascending places of the tokens in them that stay. Of others these are the
            first ones, as many as the zipped model has: their placeholders are all alike.
    """
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    stay = stay or {}
    edits = [
        [edit._replace(short=len(stay[edit.key])) if edit.key in stay else edit for edit in row] for row in plan.edits
    ]
    sources = [_sources(row, stay, *bound) for row, bound in zip(edits, plan.bounds, strict=True)]
    column = plan.cached.length
    order = _pad([torch.arange(len(row))[row >= column] for row in sources], plan.sides)
    index = torch.cat([plan.cached.columns, _look_up(sources, order, -1)], dim=1)

    def pick(values: Tensor, fill: int) -> Tensor:
        own = index.to(values.device)
        return values.gather(1, own.clamp(min=0)).masked_fill(own < 0, fill)

    given, fills = _given(arguments), {**_FILL, "input_ids": pad_token_id or 0}
    new = {name: pick(values, fills[name]) for name, values in given.items() if name != "position_ids"}
    if "position_ids" in given:
        new["position_ids"] = _positions(given["position_ids"].expand_as(ids), index)
    if mask is not None or (index < 0).any():
        keep = _kept(ids, mask)
        new_mask = pick(keep, 0)
        before = new_mask.new_ones(len(ids), 0) if mask is None else mask[:, : -ids.shape[1]]
        new["attention_mask"] = torch.cat([before.to(new_mask), new_mask], dim=1).to(keep if mask is None else mask)
    starts = torch.stack([row[0] for row in sources])[:, None]
    now = Held(index.masked_fill(index < starts, -1), ids.shape[1])
    order = torch.cat([torch.full_like(plan.cached.columns, -1), order], dim=1)
    still = [edit for row in edits for edit in row if edit.start >= column]
    return Shortened(new, still, now, edits, sources, order)


def _given(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """What runs along with the ids, as far as it is there."""
    return {name: arguments[name] for name in (*_FILL, "position_ids") if arguments.get(name) is not None}


def _kept(ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) of the prompts: which of their tokens are no padding."""
    return torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].to(ids.device)


def _look_up(rows: list[Tensor], index: Tensor, fill: float) -> Tensor:
    """Values (B, L') of rows (n,) of different length by index, -1 for padding."""
    values = pad_sequence(rows, batch_first=True)
    return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, fill)


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
    starts, ends = [edit.start for edit in edits], [edit.end for edit in edits]
    return min([int(kept[0]), *starts]), max([int(kept[-1]) + 1, *ends])


def _sources(edits: list[Edit], stay: Mapping[tuple[str, int], Tensor], start: int, end: int) -> Tensor:
    """For each token of the shortened prompt, its position in the long one."""
    pieces = []
    for edit in edits:
        pieces.append(torch.arange(start, edit.start))
        # A budget of the whole sequence may need more placeholders than there were: the last one is repeated.
        own = stay[edit.key] if edit.key in stay else torch.arange(edit.short or 0).clamp(max=edit.full - 1)
        pieces.append(edit.start + own)
        start = edit.end
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

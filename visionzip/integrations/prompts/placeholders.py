"""Shorten the runs of placeholders that the processors of transformers write for images and videos.

A stock processor writes one placeholder for each visual token of the model as it is (576 for an image of LLaVA-1.5).
A zipped model has fewer, so as many placeholders have to go, in everything that runs along with the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from visionzip.integrations.prompts.held import Held, cached_tokens
from visionzip.integrations.prompts.runs import Edit

# The arguments that have an entry for every token, and their value for padding.
_FILL = {"input_ids": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


class Shortened(NamedTuple):
    """Prompts with shortened runs.

    Attributes:
        arguments: the arguments that have an entry for every token, with L' tokens in place of L. They are those that
            were given, and an ``attention_mask`` in any case if rows differ in length.
        new: the runs that are not in the cache yet; all runs if there is no cache.
        held: the record of a cache that holds these prompts.
        edits: the runs of each row, with the number of placeholders that stay.
        columns: for each row, without padding, the columns of its tokens in the uncompressed prompt.
        order: (B, L') which entry of ``columns`` each token is, -1 for padding and for what is in the cache.
    """

    arguments: dict[str, Tensor]
    new: list[Edit]
    held: Held
    edits: list[list[Edit]]
    columns: list[Tensor]
    order: Tensor

    def spread(self, values: Mapping[tuple[str, int], Tensor], others: float | None, fill: float) -> Tensor:
        """Spread values (T,) of the tokens of each run to all tokens (B, L').

        Args:
            values: the values by modality and number of the run; a run that is missing gets the value of text.
            others: the value of text. If None, text gets its column, and the values of a run are relative to the run's.
            fill: the value of padding and of tokens that are in the cache.
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
    """How prompts will be shortened, as far as shapes tell it: all but which placeholders of a run stay.

    Attributes:
        edits: the runs of each row.
        bounds: the start and end of each prompt without its padding.
        sides: the side on which each row is padded.
        cached: the record of the prompts' tokens that the given cache holds.
    """

    edits: list[list[Edit]]
    bounds: list[tuple[int, int]]
    sides: list[str]
    cached: Held

    @property
    def new(self) -> list[Edit]:
        """The runs that are not in the cache yet; all runs if there is no cache."""
        return [edit for row in self.edits for edit in row if edit.start >= self.cached.length]


def plan_prompts(
    arguments: Mapping[str, Any],
    edits: list[list[Edit]],
    side: str | None = None,
    past: int = 0,
    held: Held | None = None,
) -> Plan:
    """Plan how prompts are shortened, before any encoder has run.

    Args:
        arguments: the same as for :func:`shorten`.
        edits: the runs of each row, from :func:`~visionzip.integrations.prompts.runs.find_runs`.
        side: the side on which all rows are padded, ``"left"`` or ``"right"``; None keeps each row's side.
        past: how many tokens of the prompts the cache holds, if the prompts begin with them; there is a mask then, and
            no ``position_ids``.
        held: the record of these tokens; if None, it is inferred from the prompts.

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
    """Shorten prompts so that each run of placeholders is as long as the zipped model's visual tokens.

    Rows lose their padding and are padded anew to the longest row: on the side where they were padded, or else on the
    side of the other rows, or on the left. So ``logits[:, -1]`` still predicts each row's next token. Tokens in a cache
    stay where they are there, and new tokens are padded among themselves after those.

    Args:
        arguments: ``input_ids`` (B, L) and, if given, ``attention_mask`` (B, P + L) with P positions of a cache,
            ``labels``, ``token_type_ids``, ``mm_token_type_ids`` and ``position_ids`` (B, L). Others are left out.
        plan: the plan of :func:`plan_prompts` for the same arguments.
        pad_token_id: the id for padding; 0 if None.
        stay: by modality and number of a run, the ascending places in it of the tokens that stay. Of the other runs the
            first ones stay, as their placeholders are all alike.
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
    """Select the given arguments that have an entry for every token."""
    return {name: arguments[name] for name in (*_FILL, "position_ids") if arguments.get(name) is not None}


def _kept(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the part (B, L) of the mask that is about the prompts; ones without a mask."""
    return torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].to(ids.device)


def _look_up(rows: list[Tensor], index: Tensor, fill: float) -> Tensor:
    """Look up values (B, L') by index in rows (n,) of different length; index -1 gets ``fill``."""
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
    """Find the start and end of a prompt without its padding; a mask (L,) of zeros alone counts as a whole prompt."""
    kept = keep.nonzero().flatten()
    if not len(kept):
        return 0, len(keep)
    # A masked image is no padding.
    starts, ends = [edit.start for edit in edits], [edit.end for edit in edits]
    return min([int(kept[0]), *starts]), max([int(kept[-1]) + 1, *ends])


def _sources(edits: list[Edit], stay: Mapping[tuple[str, int], Tensor], start: int, end: int) -> Tensor:
    """List the columns in the uncompressed prompt of the tokens that the shortened one has."""
    pieces = []
    for edit in edits:
        pieces.append(torch.arange(start, edit.start))
        # With a budget of the whole sequence, a kept CLS token may need one placeholder more: the last one is repeated.
        own = stay[edit.key] if edit.key in stay else torch.arange(edit.short or 0).clamp(max=edit.full - 1)
        pieces.append(edit.start + own)
        start = edit.end
    return torch.cat([*pieces, torch.arange(start, max(start, end))])


def _sides(bounds: list[tuple[int, int]], length: int, side: str | None) -> list[str]:
    found = ["left" if start else "right" if end < length else None for start, end in bounds]
    others = next(filter(None, found), "left")
    return [side or own or others for own in found]


def _pad(rows: list[Tensor], sides: list[str]) -> Tensor:
    """Pad rows of indices to (B, longest) with -1."""
    longest = rows[0].new_empty(max(map(len, rows)))
    padded = [
        pad_sequence([row, longest], batch_first=True, padding_value=-1, padding_side=side)[0]
        for row, side in zip(rows, sides, strict=True)
    ]
    return torch.stack(padded)


def _positions(positions: Tensor, index: Tensor) -> Tensor:
    """Number the tokens (B, L') consecutively, from the first position and from each at which positions start anew."""
    index = index.to(positions.device)
    real = index >= 0
    places = torch.arange(index.shape[1], device=index.device).expand_as(index)
    own = positions.gather(1, index.clamp(min=0))
    before = positions.gather(1, (index - 1).clamp(min=0))
    first = real & (real.cumsum(1) == 1)
    anew = first | (real & (own != before + 1) & (index > 0))
    start = torch.where(anew, places, -1).cummax(1).values.clamp(min=0)
    return (own.gather(1, start) + places - start).masked_fill(~real, 0)

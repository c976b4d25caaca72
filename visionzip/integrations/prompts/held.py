"""Record on a KV cache which tokens of the prompts it holds, and at which positions later tokens stand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionzip.integrations.prompts.runs import Edit


class Held(NamedTuple):
    """Which tokens of the uncompressed prompts a cache holds. A cache may hold more: text and answers that follow.

    Attributes:
        columns: (B, P), for each of the first P tokens of the cache its column in the prompts, or -1 for padding.
        length: how many columns of the prompts these tokens stand for.
        after: (B, P), the position of text that would follow right after each token; None if positions are consecutive,
            so that the mask tells them.
    """

    columns: Tensor
    length: int
    after: Tensor | None = None

    def grown(self, past: int) -> Held:
        """Extend the record to a cache of ``past`` tokens, at least P; the additional ones are text."""
        more = torch.arange(self.length, self.length + past - self.columns.shape[1])
        columns = torch.cat([self.columns, more.expand(len(self.columns), -1)], dim=1)
        after = self.after
        if after is not None:
            after = torch.cat([after, after[:, -1:] + 1 + torch.arange(len(more), device=after.device)], dim=1)
        return Held(columns, self.length + len(more), after)

    def cut(self, past: int) -> Held | None:
        """Shorten the record to a cache of ``past`` tokens, at most P; None if its rows end in different columns."""
        kept, gone = self.columns[:, :past], self.columns[:, past:]
        length = int(kept.max()) + 1 if past else 0
        after = None if self.after is None else self.after[:, :past]
        return None if ((gone >= 0) & (gone < length)).any() else Held(kept, length, after)

    def moved_to(self, start: int) -> Held:
        """Shift the record of a single row so that the row begins in column ``start``."""
        real = self.columns >= 0
        by = start - int(self.columns[real][0]) if real.any() else 0
        return self._replace(columns=torch.where(real, self.columns + by, -1), length=self.length + by)

    def repeated(self, copies: int) -> Held:
        """Repeat each row ``copies`` times, side by side, as beams and several answers do."""
        after = None if self.after is None else self.after.repeat_interleave(copies, dim=0)
        return Held(self.columns.repeat_interleave(copies, dim=0), self.length, after)

    def followed(self, other: Held) -> Held:
        """Append the record of prompts that were added to the cache in a later call, which had only these prompts."""
        behind = torch.where(other.columns < 0, -1, other.columns + self.length)
        both = None
        if self.after is not None and other.after is not None:
            both = torch.cat([self.after.to(other.after.device), other.after], dim=1)
        return Held(torch.cat([self.columns, behind], dim=1), self.length + other.length, both)


def original_positions(positions: Tensor, places: Tensor, held: Held) -> tuple[Tensor, Held]:
    """Look up the positions of a shortened prompt's tokens in the uncompressed prompt.

    Args:
        positions: (B, L) or (3, B, L), the positions of the uncompressed prompts.
        places: (B, L'), the column of each token there, or of the patch that it keeps; -1 for padding.
        held: the record of a cache that holds the shortened prompts.

    Returns:
        The positions (B, L') or (3, B, L'), and ``held`` with ``after``.
    """
    places = places.to(positions.device)
    index = places.clamp(min=0).expand(*positions.shape[:-2], -1, -1)
    own = positions.gather(-1, index).masked_fill(places < 0, 0)
    # Text continues from an image's rows and columns. The time axis of a long video (Qwen2.5-VL) may be ahead of them.
    highest = positions if positions.ndim == 2 else positions[1:].amax(dim=0)
    highest = highest.cummax(dim=1).values
    # A token stands for all columns up to the next token's, so the last one of a run stands for the rest of the run.
    length = positions.shape[-1]
    starts = torch.where(held.columns < 0, length, held.columns).to(positions.device)
    following = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], length)], dim=1)
    following = following.flip(1).cummin(dim=1).values.flip(1)
    after = highest.gather(1, (following - 1).clamp(min=0))
    # The columns of an image's tokens are those of its first placeholders. If the cache ends inside an image, text
    # follows the part that is left.
    left = own if own.ndim == 2 else own[1:].amax(dim=0)
    return own, held._replace(after=torch.maximum(after, left.cummax(dim=1).values) + 1)


def position_behind(held: Held | None, past: int, mask: Tensor | None) -> Tensor:
    """Compute the position (B, 1) after a cache of ``past`` tokens; after recorded tokens, the mask counts the text."""
    if held is None or held.after is None:
        return torch.tensor([[past]]) if mask is None else mask[:, :past].sum(dim=1, keepdim=True)
    noted = held.after.shape[1]
    more = past - noted if mask is None else mask[:, noted:past].sum(dim=1, keepdim=True).to(held.after)
    return held.after[:, -1:] + more if noted else torch.zeros_like(held.columns[:, :1]) + more


def held_text(past: int, mask: Tensor | None, rows: int) -> Held:
    """Make the record of a cache that was filled with text alone."""
    mask = torch.ones(rows, past).long() if mask is None else mask[:, :past].cpu().long()
    columns = torch.arange(past).expand(rows, -1).masked_fill(mask == 0, -1)
    return Held(columns, past, mask.cumsum(dim=1))


def cached_tokens(sources: list[Tensor], edits: list[list[Edit]], past: int, held: Held | None) -> Held:
    """Find out which tokens of the prompts (B, L) a cache of ``past`` tokens holds.

    Args:
        sources: for each prompt, the columns of the tokens that its shortened form has.
        edits: the runs of each prompt.
        past: how many tokens the cache holds.
        held: the record on the cache, if there is one.

    Raises:
        ValueError: no token is new, the cache ends inside an image, or its padding differs or is unknown.
    """
    if held is None:
        held = _infer_held(sources, edits, past)
    elif len(sources) == 1:  # a single row has no padding in the cache, so its own may differ now
        held = held.moved_to(int(sources[0][0]))
    cached = _behind_images(held.grown(past), sources, edits, past)
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
    return cached


def _behind_images(cached: Held, sources: list[Tensor], edits: list[list[Edit]], past: int) -> Held:
    """Extend the record past an image's last placeholder, if the cache ends with all tokens of that image.

    Raises:
        ValueError: the cache ends inside an image.
    """
    length = cached.length
    for columns, own in zip(cached.columns, edits, strict=True):
        for edit in own:
            if not edit.start < cached.length < edit.end:
                continue
            if int(((columns >= edit.start) & (columns < edit.end)).sum()) != edit.short:
                raise ValueError(
                    f"past_key_values holds {past} tokens, which ends inside {edit.modality} {edit.number}: it was cut "
                    "there, or is of another conversation, or of one that was not zipped. Crop it in front of the "
                    f"{edit.modality}, or behind it"
                )
            length = max(length, edit.end)
    if any(((row >= cached.length) & (row < length)).any() for row in sources):
        raise ValueError(
            f"past_key_values holds {past} tokens of each prompt, which end behind an image in one and before the same "
            "column in another: crop it elsewhere, or leave it out"
        )
    return cached._replace(length=length)


def _infer_held(sources: list[Tensor], edits: list[list[Edit]], past: int) -> Held:
    """Infer the record of a cache without one, which is possible if it holds text alone or no padding.

    Raises:
        ValueError: neither is the case.
    """
    if any(edit.short is None and edit.start < past for row in edits for edit in row):
        raise ValueError(
            f"past_key_values holds {past} tokens, but not how many each frame of a video has of them: give a cache "
            "that this model has filled, or leave it out"
        )
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

"""Which tokens of the prompts a KV cache holds, and where what follows stands. Noted on the cache itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionzip.integrations.runs import Edit


class Held(NamedTuple):
    """What a cache holds of prompts, as far as these were shortened; behind it are text and answers, as they are.

    Attributes:
        columns: (B, P) where in the prompts each token of the cache is, -1 for padding.
        length: columns of the prompts.
        after: (B, P) the position that text right behind each token has; None where the mask says it (consecutive
            positions).
    """

    columns: Tensor
    length: int
    after: Tensor | None = None

    def grown(self, past: int) -> Held:
        """The same of a cache of ``past`` tokens, P or more."""
        more = torch.arange(self.length, self.length + past - self.columns.shape[1])
        columns = torch.cat([self.columns, more.expand(len(self.columns), -1)], dim=1)
        after = self.after
        if after is not None:
            after = torch.cat([after, after[:, -1:] + 1 + torch.arange(len(more), device=after.device)], dim=1)
        return Held(columns, self.length + len(more), after)

    def cut(self, past: int) -> Held | None:
        """The same of a cache of ``past`` tokens, P or fewer; None if its rows end in different columns."""
        kept, gone = self.columns[:, :past], self.columns[:, past:]
        length = int(kept.max()) + 1 if past else 0
        after = None if self.after is None else self.after[:, :past]
        return None if ((gone >= 0) & (gone < length)).any() else Held(kept, length, after)

    def moved_to(self, start: int) -> Held:
        """The same of a single row that begins in another column."""
        real = self.columns >= 0
        by = start - int(self.columns[real][0]) if real.any() else 0
        return self._replace(columns=torch.where(real, self.columns + by, -1), length=self.length + by)

    def repeated(self, copies: int) -> Held:
        """The same of a cache with so many copies of each row, side by side."""
        after = None if self.after is None else self.after.repeat_interleave(copies, dim=0)
        return Held(self.columns.repeat_interleave(copies, dim=0), self.length, after)

    def followed(self, other: Held) -> Held:
        """The same of a cache that got ``other``'s prompts as well, which were given without these."""
        behind = torch.where(other.columns < 0, -1, other.columns + self.length)
        both = None
        if self.after is not None and other.after is not None:
            both = torch.cat([self.after.to(other.after.device), other.after], dim=1)
        return Held(torch.cat([self.columns, behind], dim=1), self.length + other.length, both)


def original_positions(positions: Tensor, places: Tensor, held: Held) -> tuple[Tensor, Held]:
    """Positions of shortened prompts whose tokens keep those that they have in the prompts as they are.

    Args:
        positions: (B, L) of those, or (3, B, L).
        places: (B, L') column of each token, or of the patch that it keeps; -1 for padding.
        held: what a cache holds that is given these prompts.

    Returns:
        (B, L') or (3, B, L'), and ``held`` with ``after``.
    """
    places = places.to(positions.device)
    index = places.clamp(min=0).expand(*positions.shape[:-2], -1, -1)
    own = positions.gather(-1, index).masked_fill(places < 0, 0)
    # Text goes on behind an image's rows and columns; of Qwen2.5-VL, the time of a long video is ahead of that.
    highest = positions if positions.ndim == 2 else positions[1:].amax(dim=0)
    highest = highest.cummax(dim=1).values
    # A token's part of the prompt ends where the next one begins: a run's last one stands for all behind it.
    length = positions.shape[-1]
    starts = torch.where(held.columns < 0, length, held.columns).to(positions.device)
    following = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], length)], dim=1)
    following = following.flip(1).cummin(dim=1).values.flip(1)
    after = highest.gather(1, (following - 1).clamp(min=0))
    # Within an image, columns are those of its first placeholders: behind a cut one, text follows what is left of it.
    left = own if own.ndim == 2 else own[1:].amax(dim=0)
    return own, held._replace(after=torch.maximum(after, left.cummax(dim=1).values) + 1)


def position_behind(held: Held | None, past: int, mask: Tensor | None) -> Tensor:
    """(B, 1) position of what comes behind a cache of ``past`` tokens; text behind what is noted counts by the mask."""
    if held is None or held.after is None:
        return torch.tensor([[past]]) if mask is None else mask[:, :past].sum(dim=1, keepdim=True)
    noted = held.after.shape[1]
    more = past - noted if mask is None else mask[:, noted:past].sum(dim=1, keepdim=True).to(held.after)
    return held.after[:, -1:] + more if noted else torch.zeros_like(held.columns[:, :1]) + more


def held_text(past: int, mask: Tensor | None, rows: int) -> Held:
    """What a cache holds that was filled with text alone."""
    mask = torch.ones(rows, past).long() if mask is None else mask[:, :past].cpu().long()
    columns = torch.arange(past).expand(rows, -1).masked_fill(mask == 0, -1)
    return Held(columns, past, mask.cumsum(dim=1))


def cached_tokens(sources: list[Tensor], edits: list[list[Edit]], past: int, held: Held | None) -> Held:
    """What a cache of ``past`` tokens holds of the prompts (B, L).

    Raises:
        ValueError: nothing is new, the cache ends inside an image, or its padding is another one or not known.
    """
    if held is None:
        held = _infer_held(sources, edits, past)
    elif len(sources) == 1:  # a row alone may have other padding now
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
    """The same of a cache that ends with all tokens of an image: behind the image's last placeholder.

    Raises:
        ValueError: it ends inside of one.
    """
    length = cached.length
    for columns, own in zip(cached.columns, edits, strict=True):
        for edit in own:
            if not edit.start < cached.length < edit.end:
                continue
            if int(((columns >= edit.start) & (columns < edit.end)).sum()) != edit.short:
                raise ValueError(
                    f"past_key_values holds {past} tokens, which ends inside {edit.modality} {edit.index}: it was cut "
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
    """The same of a cache that was filled by other means than ``generate``, which holds text alone or no padding."""
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

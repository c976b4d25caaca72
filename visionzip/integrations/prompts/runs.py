"""Find the runs of placeholders that the processors of transformers write for images and videos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """How many placeholders one image or video has, from the stock processor and in the zipped model.

    Attributes:
        full: how many tokens of the prompt the stock processor writes, including tokens that end rows.
        short: how many of them the zipped model has, counted alike; None if that is known only once tokens are chosen,
            as for a frame that shares the budget of its video.
        row: how many placeholders a row has if a token of its own ends every row, such as Pixtral's ``[IMG_BREAK]`` and
            ``[IMG_END]``; otherwise 0. Tokens that end rows are part of the run, and all of them stay.
    """

    full: int
    short: int | None
    row: int = 0


@dataclass(frozen=True)
class Visual:
    """All images, or all videos, of a batch, in the order of the prompts.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        token_id: the id of their placeholder.
        runs: a run for each.
    """

    modality: str
    token_id: int
    runs: Sequence[Run]


class Edit(NamedTuple):
    """The :class:`Run` of one image or video at its place in a prompt.

    Attributes:
        start: the column of the prompt in which the run starts.
        full: as in :class:`Run`, like ``short`` and ``row``.
        short: as in :class:`Run`.
        row: as in :class:`Run`.
        modality: ``"image"`` or ``"video"``.
        number: which of the batch's images or videos it is, from 0.
    """

    start: int
    full: int
    short: int | None
    row: int
    modality: str
    number: int

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the image or video in the batch: its modality and number."""
        return self.modality, self.number

    @property
    def end(self) -> int:
        """The column after the run."""
        return self.start + self.full


def find_runs(input_ids: Tensor, visuals: Iterable[Visual]) -> list[list[Edit]]:
    """Find each image's placeholders in the prompts, which have to be the runs that the stock processor writes.

    Args:
        input_ids: (B, L), the prompts.
        visuals: the images and videos of the call.

    Returns:
        The runs of each row, in order.

    Raises:
        ValueError: there is no prompt, a run of placeholders is not made of whole images, or there are more or fewer
            runs than images. The message names the row, the image, both lengths and the cure.
    """
    if input_ids.ndim != 2 or not len(input_ids):
        raise ValueError(f"input_ids must be (B, L) with B >= 1, got {tuple(input_ids.shape)}")
    edits: list[list[Edit]] = [[] for _ in input_ids]
    for visual in visuals:
        used = 0
        in_rows = any(run.row for run in visual.runs)
        for row, prompt in enumerate((input_ids == visual.token_id).cpu()):  # one transfer, not one for each run
            for start, length in stretches(_with_row_ends(prompt) if in_rows else prompt):
                own = _split_run(start, length, visual, used, row)
                for edit in own:
                    _check_rows(prompt, edit, row)
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
    """List the start and length of each stretch of true values in a mask (L,)."""
    steps = torch.diff(mask.int(), prepend=mask.new_zeros(1).int(), append=mask.new_zeros(1).int())
    starts, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def row_ends(run: Run | Edit) -> Tensor:
    """List the places (rows,) within a run of the tokens that end its rows; empty if the run has no such tokens."""
    return torch.arange(run.row, run.full, run.row + 1) if run.row else torch.arange(0)


def _with_row_ends(mask: Tensor) -> Tensor:
    """Add to a mask of placeholders (L,) the token after each, which is another placeholder or ends a row."""
    behind = torch.zeros_like(mask)
    behind[1:] = mask[:-1]
    return mask | behind


def _check_rows(placeholders: Tensor, edit: Edit, row: int) -> None:
    if edit.row and not torch.equal((~placeholders[edit.start : edit.end]).nonzero().flatten(), row_ends(edit)):
        raise ValueError(
            f"{edit.modality} {edit.number} of the batch has rows of {edit.row} placeholders with a token behind each, "
            f"but prompt {row} has others: prepare pictures and prompts with the model's own processor"
        )


def _split_run(start: int, length: int, visual: Visual, used: int, row: int) -> list[Edit]:
    """Split a stretch of placeholders into images, as images side by side in a prompt have no text between them."""
    edits: list[Edit] = []
    end = start + length
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

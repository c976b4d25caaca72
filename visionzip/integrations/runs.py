"""Finds the runs of placeholders that transformers' processors write for images and videos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Placeholders of one image or video: as the stock processor writes them, and what the zipped model has of them.

    Attributes:
        full: tokens of the prompt, ends of rows included.
        short: likewise when zipped; None where it is known only once tokens are chosen, as of a frame that shares the
            budget of its video.
        row: placeholders in each row where a token of its own ends every row, as Pixtral's ``[IMG_BREAK]`` and, of the
            last one, ``[IMG_END]``; else 0. These ends are part of the run, and all of them stay.
    """

    full: int
    short: int | None
    row: int = 0


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
    """One image's or video's :class:`Run` in a prompt, and where it starts."""

    start: int
    full: int
    short: int | None
    row: int
    modality: str
    number: int

    @property
    def key(self) -> tuple[str, int]:
        """Which one it is of all."""
        return self.modality, self.number

    @property
    def end(self) -> int:
        """The column behind it."""
        return self.start + self.full


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
        in_rows = any(run.row for run in visual.runs)
        for row, prompt in enumerate((input_ids == visual.token_id).cpu()):  # one transfer, not one per run
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
    """Start and length of each stretch of true values in a mask (L,)."""
    steps = torch.diff(mask.int(), prepend=mask.new_zeros(1).int(), append=mask.new_zeros(1).int())
    starts, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def row_ends(run: Run | Edit) -> Tensor:
    """Places (rows,) of the tokens that end the rows of a run; none where there are no rows."""
    return torch.arange(run.row, run.full, run.row + 1) if run.row else torch.arange(0)


def _with_row_ends(mask: Tensor) -> Tensor:
    """Placeholders (L,), and the token behind each: the next one, or what ends its row."""
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
    """The images of one stretch: images side by side in a prompt make one."""
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

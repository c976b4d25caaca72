"""Keep patches that a person has picked. This method is made for one image, so the registry does not have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, kept_patches

Patches = Sequence[int] | Sequence[Sequence[int]]


def picked_rows(patches: Patches) -> list[list[int]]:
    """Sort the picked patches of each encoder input, each once; a plain list makes one row, for all inputs.

    Raises:
        TypeError: a patch's number is no integer.
        ValueError: no patch is picked, or the lists differ in length.
    """
    nested = len(patches) > 0 and not any(hasattr(entry, "__index__") for entry in patches)
    lists: Sequence[Any] = patches if nested else [patches]
    rows = [sorted({_index(patch) for patch in row}) for row in lists]
    if not all(rows):
        raise ValueError("no patch is picked: choose at least one of each image, tile or frame")
    if len(counts := {len(row) for row in rows}) > 1:
        raise ValueError(
            f"{min(counts)} to {max(counts)} patches are picked of {len(rows)} tiles or images: choose as many of each"
        )
    return rows


def _index(patch: Any) -> int:
    if not hasattr(patch, "__index__"):
        raise TypeError(f"a picked patch is {patch!r}, not its number: they are counted row by row from 0")
    return int(patch.__index__())


def picked(patches: Patches, cls_token: bool = False) -> Method:
    """Make a method that keeps given patches and drops all others.

    Args:
        patches: the patches' numbers, row by row from 0: one list, whose patches are kept of every encoder input
            (image, tile, frame), or one list for each input, equally long.
        cls_token: whether to keep the CLS token too, if the encoder has one.

    Returns:
        The method. Its budget is the number of patches, plus one with a CLS token. Attaching it raises ValueError if a
        patch is outside the grid; choosing also does if there are as many lists as neither 1 nor the encoder inputs.

    Raises:
        TypeError: a patch's number is no integer.
        ValueError: no patch is picked, or the lists differ in length.
    """
    rows = picked_rows(patches)

    def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
        batch = len(read.hidden_states)
        if len(rows) not in (1, batch):
            raise ValueError(
                f"patches are picked of {len(rows)} encoder inputs, but the images come as {batch}: give one list for "
                "each tile of each image, or one for all"
            )
        _check(rows, read.grid if read.has("grid") else (1, read.patches.shape[1]))
        indices = torch.tensor(rows, device=read.hidden_states.device).expand(batch, -1)
        kept = kept_patches(read, indices)
        if not counts.cls_token:
            return kept
        tokens = torch.cat([read.hidden_states[:, :1], kept.tokens], dim=1)
        return kept._replace(tokens=tokens, dominant_indices=F.pad(kept.dominant_indices, (1, 0)))

    return Method(
        "picked",
        "patches picked by hand",
        choose,
        frozenset({"grid"}),
        keeps_cls=cls_token,
        check=lambda tokens, grid: _check(rows, grid),
    )


def _check(rows: list[list[int]], grid: tuple[int, int]) -> None:
    last = grid[0] * grid[1] - 1
    if wrong := [patch for row in rows for patch in (row[0], row[-1]) if not 0 <= patch <= last]:
        raise ValueError(f"patch {wrong[0]} is outside the grid of {grid[0]} x {grid[1]} patches (0 to {last})")

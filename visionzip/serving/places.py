"""The places of an image's kept tokens in the language model of Qwen-VL, which has positions (time, row, column).

The engine knows how many tokens an image keeps as a request arrives, but which ones only once the encoder has run. So
the row and the column of each token travel with its embedding, through the engine's caches too, and cannot be those of
another choice. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PLACES = 4  # values that are added to a token: two digits for its row, two for its column
_BASE = (
    256  # all digits up to here are exact in bfloat16, which has 8 bits for them; 65 535 rows are more than any image
)


class Placed(NamedTuple):
    """An image in a prompt: where its first placeholder is, how many there are, and its rows and columns of tokens."""

    offset: int
    kept: int
    rows: int
    columns: int


def with_places(tokens: Tensor, places: Tensor, columns: int) -> Tensor:
    """Add the places of tokens to their embeddings: (n, D) to (n, D + 4).

    Args:
        tokens: (n, D), the chosen tokens of an image.
        places: (n,) int64, their places in raster order.
        columns: how many tokens a row of the image has.
    """
    row, column = places // columns, places % columns
    digits = torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], dim=1)
    return torch.cat([tokens, digits.to(tokens.dtype)], dim=1)


def split_places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split what :func:`with_places` returned, or some of its rows: tokens (n, D), and row and column (n, 2) int64."""
    digits = rows[:, -PLACES:].long().unflatten(1, (2, 2))
    return rows[:, :-PLACES], digits[..., 0] * _BASE + digits[..., 1]


def prompt_positions(length: int, images: Sequence[Placed]) -> tuple[Tensor, int]:
    """Compute the positions of a short prompt, up to the rows and columns of its images' tokens.

    Text has the position that it has in the uncompressed prompt, and so has all that is generated. A placeholder has
    the position of its image's first row and column on all three axes: the token's own row and column are to be added
    to the second and third.

    Args:
        length: L, the tokens of the prompt.
        images: the images in it, in order.

    Returns:
        The positions (3, L) int64, and what to add to the index of a token behind the prompt for its position.
    """
    pieces, at, start = [], 0, 0
    for offset, kept, rows, columns in images:
        text = offset - at
        pieces += [torch.arange(start, start + text), torch.full((kept,), start + text)]
        start += text + max(rows, columns)
        at = offset + kept
    pieces.append(torch.arange(start, start + length - at))
    return torch.cat(pieces).repeat(3, 1), start - at

"""Controls: the plainest ways to choose T tokens, which any method that looks at the image has to beat."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.methods.base import EncoderRead, Method, TokenCounts, kept_patches


def choose_randomly(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Keep K patches at random.

    The choice follows from the seed and the image's pixels, so that it does not depend on the batch, and all questions
    about an image see the same patches. It is made on the host.
    """
    start = zlib.crc32(config.seed.to_bytes(8, "little"))
    patches = read.patches.shape[1]
    indices = torch.stack([_permutation(image, start, patches)[: counts.dominant] for image in read.pixels])
    return kept_patches(read, indices.to(read.hidden_states.device))


def _permutation(image: Tensor, start: int, patches: int) -> Tensor:
    pixels = image.detach().cpu().contiguous().view(torch.uint8).numpy().data
    # A checksum of 32 bits: the CPU generator ignores the upper half of a longer seed.
    generator = torch.Generator().manual_seed(zlib.crc32(pixels, start))
    return torch.randperm(patches, generator=generator)


def choose_evenly(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Keep K evenly spaced patches: the sequence is cut into K equal stretches, and the middle of each is kept."""
    slots = torch.arange(counts.dominant, device=read.hidden_states.device)
    indices = (2 * slots + 1) * read.patches.shape[1] // (2 * counts.dominant)
    return kept_patches(read, indices.expand(len(read.hidden_states), -1))


def average_areas(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Average the grid of patches to M cells by adaptive pooling; :func:`pooled_grid` says how they are laid out.

    A cell's target is the patch in its middle. Cells may overlap; a patch is then assigned to one of them.

    Raises:
        ValueError: M cells make no grid that fits.
    """
    rows, columns = pooled_grid(counts.total, read.grid)
    if counts.contextual == 0:  # nothing is compressed
        return kept_patches(
            read, torch.arange(counts.dominant).to(read.hidden_states.device).expand(len(read.hidden_states), -1)
        )
    field = read.patches.unflatten(1, read.grid).permute(0, 3, 1, 2)
    cells = F.adaptive_avg_pool2d(field, (rows, columns)).flatten(2).mT
    device, first, batch = cells.device, int(read.cls_token), len(cells)
    y, own_row = _stretches(read.grid[0], rows, device)
    x, own_column = _stretches(read.grid[1], columns, device)
    targets = (y[:, None] * read.grid[1] + x).flatten() + first
    owner = (own_row[:, None] * columns + own_column).flatten()
    return CompressedTokens(
        tokens=cells,
        dominant_indices=targets.new_empty(batch, 0),
        target_indices=targets.expand(batch, -1),
        assignment=F.pad(owner, (first, 0), value=-1).expand(batch, -1),
    )


def _stretches(patches: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut an edge into stretches: the middle patch (cells,) of each, and the stretch (patches,) of each patch."""
    middles = (2 * torch.arange(cells, device=device) + 1) * patches // (2 * cells)
    return middles, torch.arange(patches, device=device) * cells // patches


def pooled_grid(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Find the rows and columns of T cells that are closest to a square (16: 4 x 4, 32: 4 x 8, 48: 6 x 8).

    Args:
        tokens: T.
        grid: (rows, columns) of the patches; the cells may not have more of either.

    Raises:
        ValueError: T has no two factors that fit into the grid.
    """
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    if rows > grid[0] or tokens // rows > grid[1]:
        raise ValueError(
            f"tokens={tokens} cannot be pooled: its squarest grid is {rows} x {tokens // rows}, but the image has "
            f"{grid[0]} x {grid[1]} patches. Use a number with two factors of at most {min(grid)}"
        )
    return rows, tokens // rows


RANDOM = Method("random", "control: patches at random", choose_randomly, frozenset({"pixels"}), seeded=True)
UNIFORM = Method("uniform", "control: evenly spaced patches", choose_evenly)
POOL = Method(
    "pool",
    "control: the patches averaged to T cells",
    average_areas,
    frozenset({"grid"}),
    split=lambda tokens: (0, tokens),
    keeps_patches=False,
    check=pooled_grid,
)

"""The order of LLaVA-NeXT's compressed tiles."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import GOLDEN
from visionzip.tiles import tile_order


@st.composite
def tilings(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of tile_order: any grid, also of tiles that are not square."""
    grid, patches = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(1, 6)] * 2))
    cls_token, random = draw(st.booleans()), draw(st.randoms())
    count = patches[0] * patches[1]
    kept = draw(st.integers(1 - cls_token, count))
    rows = [sorted(random.sample(range(count), kept)) for _ in range(grid[0] * grid[1] + 1)]
    indices = [[0] * cls_token + [patch + cls_token for patch in row] for row in rows]
    return {
        "dominant_indices": torch.tensor(indices),
        "contextual": draw(st.integers(0, 4)),
        "grid": grid,
        "patches": patches,
        "cls_token": cls_token,
    }


def reference_order(
    dominant_indices: Tensor, contextual: int, grid: tuple[int, int], patches: tuple[int, int], *, cls_token: bool
) -> list[int]:
    """The documented order, by sorting the patches' coordinates."""
    tiles, kept = dominant_indices.shape
    length = kept + contextual
    patch_slots = []
    for tile in range(1, tiles):
        tile_y, tile_x = divmod(tile - 1, grid[0])
        for slot in range(cls_token, kept):
            y, x = divmod(int(dominant_indices[tile, slot]) - cls_token, patches[0])
            patch_slots.append((tile_y * patches[1] + y, tile_x * patches[0] + x, tile * length + slot))
    return [
        *range(length),
        *(position for _, _, position in sorted(patch_slots)),
        *(tile * length for tile in range(1, tiles) if cls_token),
        *(tile * length + slot for tile in range(1, tiles) for slot in range(kept, length)),
    ]


@settings(max_examples=60, deadline=None)
@given(tilings())
def test_tile_order_equals_the_slow_reference(tiling: dict[str, Any]):
    order = tile_order(**tiling).tolist()
    assert order == reference_order(**tiling)
    tiles, kept = tiling["dominant_indices"].shape
    assert sorted(order) == list(range(tiles * (kept + tiling["contextual"])))


@pytest.mark.parametrize("name, grid", [("arch_next_wide", (3, 1)), ("arch_next_tall", (1, 2))])
def test_tile_order_of_the_released_code(name: str, grid: tuple[int, int]):
    """Recorded (tile, kind, index) of each token; kind 0 is CLS, 1 a kept patch, 2 contextual."""
    recorded = load_file(GOLDEN / f"{name}.safetensors")
    contextual = json.loads((GOLDEN / f"{name}.json").read_text())["visionzip"]["contextual_arg"]
    provenance = [
        [(tile, 0, -1), *((tile, 1, position - 1) for position in positions[1:])]
        + [(tile, 2, slot) for slot in range(contextual)]
        for tile, positions in enumerate(recorded["dominant_idx_sorted"].tolist())
    ]
    order = tile_order(recorded["dominant_idx_sorted"], contextual, grid, (24, 24))
    assert torch.equal(torch.tensor(provenance).flatten(0, 1)[order], recorded["visual_order_0"].long())


def test_tile_order_of_a_wrong_grid():
    with pytest.raises(ValueError, match="a grid of 2 x 2 does not hold 3 tiles"):
        tile_order(torch.zeros(4, 5, dtype=torch.int64), 2, (2, 2), (6, 6))

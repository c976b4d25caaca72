"""The choice of visual tokens between layers: the highest scores, ties to the lower place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from visionzip.language.selection import keep_top


def random_rows(count: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        length = int(torch.randint(1, 40, (), generator=generator))
        scores = torch.randint(0, 6, (length,), generator=generator).float()  # many are equal
        candidates = torch.rand(length, generator=generator) < 0.6
        yield scores, candidates, int(torch.randint(0, length + 2, (), generator=generator))


def test_selection():
    """As many candidates as asked for or there are; none that is left out beats one that is kept, ties to the lower."""
    for scores, candidates, number in random_rows(200):
        kept = keep_top(scores, candidates, number)
        assert kept.sum() == min(number, int(candidates.sum())) and not (kept & ~candidates).any()
        inside, outside = ([(-scores[i].item(), i) for i in m.nonzero().flatten()] for m in (kept, candidates & ~kept))
        assert not inside or not outside or max(inside) < min(outside)
        assert torch.equal(kept, keep_top(2 * scores + 1, candidates, number))

"""``group_sizes``: how many patches each kept token stands for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_compress import cosine, tensors

from visionzip.compress import group_sizes

properties = settings(max_examples=60, deadline=None)


def slow_sizes(keys: list[list[float]], kept: list[int], cls_token: bool) -> list[float]:
    """Patches that each kept token of one image stands for, one patch after the other."""
    patches = [slot for slot, position in enumerate(kept) if not (cls_token and position == 0)]
    sizes = [1.0] * len(kept)
    for position in range(int(cls_token), len(keys)):
        if position not in kept:
            nearest = max(patches or [0], key=lambda slot: (cosine(keys[position], keys[kept[slot]]), -slot))
            sizes[nearest] += 1
    return sizes


@properties
@given(cls_token=st.booleans(), length=st.integers(2, 20), seed=st.integers(0, 2**31), data=st.data())
def test_sizes_equal_the_slow_reference(cls_token: bool, length: int, seed: int, data: st.DataObject):
    keys = tensors(2, length, cls_token=cls_token, seed=seed)["keys"]
    kept = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=length, unique=True))
    sizes = group_sizes(keys, torch.tensor([kept, kept]), cls_token)
    assert sizes.dtype == torch.float32
    assert sizes.tolist() == [slow_sizes(row, kept, cls_token) for row in keys.tolist()]
    patches = length - cls_token
    assert sizes.sum(dim=1).tolist() == [patches + (cls_token and 0 in kept)] * 2 and (sizes >= 1).all()


def test_sizes_of_hard_keys():
    """Equal keys and keys of norm zero count for the first kept patch; every kept one counts for itself."""
    kept = torch.tensor([[1, 4, 6]])
    for keys in (torch.ones(1, 8, 4), torch.zeros(1, 8, 4)):
        assert group_sizes(keys, kept, True).tolist() == [[5.0, 1.0, 1.0]]
    assert group_sizes(torch.ones(1, 8, 4), torch.tensor([[0, 5]]), True).tolist() == [[1.0, 7.0]]  # CLS counts none
    assert group_sizes(torch.ones(1, 8, 4), torch.tensor([[0]]), True).tolist() == [[8.0]]  # but is all there is


def test_sizes_compile_to_one_graph():
    keys, kept = tensors()["keys"], torch.tensor([[1, 4, 6], [2, 3, 5]])
    sizes = torch.compile(group_sizes, fullgraph=True, backend="eager")(keys, kept, True)
    assert torch.equal(sizes, group_sizes(keys, kept, True))

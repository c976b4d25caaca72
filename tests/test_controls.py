"""Controls and the CLS ablation: what is kept, on what that depends, and that it comes off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from checkpoints import NEXT, SIGLIP
from visionzip import unzip, visionzip
from visionzip.baselines import average_pool, drop_cls_token, random_tokens, remove_control, uniform_tokens
from visionzip.baselines.controls import pooled_grid

CONTROLS: list[Callable[..., Any]] = [random_tokens, uniform_tokens, average_pool]


def pixels(count: int, edge: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(3))


def places(kept: torch.Tensor, patches: torch.Tensor) -> list[int]:
    """Where each of some tokens (T, D) is among the patches (N, D)."""
    return [(patches == token).all(dim=1).nonzero().item() for token in kept]


@pytest.fixture
def model(load):
    return load()[1]  # 4 x 4 patches and CLS


def test_random_keeps_patches_in_raster_order(model):
    tower, images = model.get_vision_tower(), pixels(3)
    patches = tower(images)
    kept = random_tokens(model, 6).get_vision_tower()(images)
    chosen = [places(*pair) for pair in zip(kept, patches, strict=True)]
    assert all(row == sorted(set(row)) and len(row) == 6 for row in chosen)
    assert len({tuple(row) for row in chosen}) > 1


def test_random_depends_on_the_image_and_the_seed_only(model):
    tower, images = model.get_vision_tower(), pixels(6)
    first = random_tokens(model, 4, seed=0).get_vision_tower()(images)
    torch.testing.assert_close(tower(images[4:5]), first[4:5])
    torch.testing.assert_close(tower(images.flip(0)), first.flip(0))
    other = random_tokens(model, 4, seed=1).get_vision_tower()(images)
    assert not torch.equal(other, first)
    torch.testing.assert_close(random_tokens(model, 4, seed=0).get_vision_tower()(images), first)


def test_random_keeps_each_patch_equally_often(model):
    tower = random_tokens(model, 4).get_vision_tower()
    counts = torch.zeros(16)
    patches = torch.arange(16.0)[:, None].expand(400, 16, 1)
    (hook,) = tower._forward_hooks.values()
    kept = hook(tower, (pixels(400, edge=4),), patches)
    counts.index_add_(0, kept.flatten().long(), torch.ones(kept.numel()))
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, standard deviation below 9


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, [8]), (4, [2, 6, 10, 14]), (3, [2, 8, 13]), (16, list(range(16)))]
)
def test_uniform_is_evenly_spaced(model, tokens: int, expected: list[int]):
    tower, images = model.get_vision_tower(), pixels(2)
    patches = tower(images)
    kept = uniform_tokens(model, tokens).get_vision_tower()(images)
    assert [places(*pair) for pair in zip(kept, patches, strict=True)] == [expected, expected]


def test_pool_averages_cells_of_the_grid(model):
    tower, images = model.get_vision_tower(), pixels(2)
    rows = tower(images).unflatten(1, (4, 4))
    cells = [rows[:, 2 * y : 2 * y + 2, x].mean(dim=1) for y in range(2) for x in range(4)]
    torch.testing.assert_close(average_pool(model, 8).get_vision_tower()(images), torch.stack(cells, dim=1))


def test_pooled_grids():
    grids = {16: (4, 4), 32: (4, 8), 48: (6, 8), 64: (8, 8), 128: (8, 16), 192: (12, 16), 7: (1, 7)}
    assert {tokens: pooled_grid(tokens, 24) for tokens in grids} == grids
    with pytest.raises(ValueError, match=r"tokens=26 cannot be pooled: its squarest grid is 2 x 13.*12 x 12 patches"):
        pooled_grid(26, 12)


@pytest.mark.parametrize("control", CONTROLS)
def test_through_the_model_and_off_again(model, control: Callable[..., Any]):
    images, prompt = pixels(2), torch.tensor([[1, -200, 7, 8], [1, -200, 9, 10]])
    before = model(prompt, images=images).logits
    assert control(model, 6) is model
    with_control = model(prompt, images=images).logits
    assert with_control.shape[1] == before.shape[1] - 10
    # However the images are given, and whether they come alone.
    torch.testing.assert_close(model(prompt, images=list(images)).logits, with_control)
    torch.testing.assert_close(model(prompt[1:], images=images[1:]).logits, with_control[1:])
    torch.testing.assert_close(torch.cat(model.get_vision_tower()(list(images))), model.get_vision_tower()(images))
    control(model, 3)  # again: in the place of the first
    assert model.visual_tokens(images)[0].shape[0] == 3
    assert remove_control(model) is model and remove_control(model) is model
    assert torch.equal(model(prompt, images=images).logits, before)
    assert not model.get_vision_tower()._forward_hooks


def test_only_this_model(load):
    images = pixels(1)
    one, other = load()[1], load()[1]
    uniform_tokens(one, 5)
    assert [model.visual_tokens(images)[0].shape[0] for model in (one, other)] == [5, 16]


def test_without_a_cls_token(load):
    _, model, _, _ = load(vision=SIGLIP)
    assert random_tokens(model, 5).visual_tokens(pixels(1))[0].shape[0] == 5
    with pytest.raises(ValueError, match="the vision tower has no CLS token"):
        drop_cls_token(visionzip(remove_control(model), 4, 2))


@pytest.mark.parametrize("control", CONTROLS)
def test_refused(load, control: Callable[..., Any]):
    _, model, _, _ = load()
    for tokens in (0, 17):
        with pytest.raises(ValueError, match=f"tokens={tokens} is outside 1 to 16"):
            control(model, tokens)
    with pytest.raises(ValueError, match=r"the model is zipped.*call unzip"):
        control(visionzip(model, 4, 2), 6)
    with pytest.raises(ValueError, match="'anyres' cuts images into grids"):
        control(load(**NEXT)[1], 6)
    with pytest.raises(ValueError, match="'cls_patch' passes the CLS token on"):
        control(load(mm_vision_select_feature="cls_patch")[1], 6)
    with pytest.raises(TypeError, match="does not support Linear"):
        control(torch.nn.Linear(2, 2), 6)


def test_a_negative_seed_is_refused(model):
    with pytest.raises(ValueError, match="seed=-1 is negative"):
        random_tokens(model, 4, seed=-1)


def test_drop_cls_token(model):
    images = pixels(2)
    whole = visionzip(model, 5, 2).visual_tokens(images)
    without = drop_cls_token(model).visual_tokens(images)
    for mine, all_of_them in zip(without, whole, strict=True):
        torch.testing.assert_close(mine, all_of_them[1:])
    remove_control(model)
    for mine, all_of_them in zip(model.visual_tokens(images), whole, strict=True):
        assert torch.equal(mine, all_of_them)
    with pytest.raises(ValueError, match="the vision tower is not zipped"):
        drop_cls_token(unzip(model))


def test_zipping_under_a_control_is_an_error(model):
    images = pixels(1)
    visionzip(uniform_tokens(model, 4), 5, 2)
    with pytest.raises(RuntimeError, match="zipped under a control"):
        model.encode_images(images)
    unzip(drop_cls_token(model))
    with pytest.raises(RuntimeError, match="unzipped under drop_cls_token"):
        model.encode_images(images)

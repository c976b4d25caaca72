"""Where kept tokens stand among those that are not there, for each way that a family lays an image out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mini_gemini import pixels as large_pixels

from checkpoints import NEXT, SIGLIP, picture, pixels
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.tiles import Layout, lay_out_tiles
from visionzip import visionzip

PLUS = {"keep": 5, "method": "visionzip-plus"}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def test_patches_stand_where_they_were(load):
    """Of 4 x 4 patches, numbers 2, 6, 10 and 14 are kept; all 16 places are taken."""
    model, images = load()[1], pixels(1)
    image = visionzip(model, keep=4, method="uniform", positions="original").placed_tokens(images)[0]
    assert image.places.tolist() == [2, 6, 10, 14] and image.length == 16 and image.sizes is None
    image = visionzip(model, 5, 2).placed_tokens(images)[0]  # the paper's: one after the other
    assert image.places is None and image.length == 7


@pytest.mark.parametrize("vision", [{}, {"vision": SIGLIP}, {"mm_vision_select_feature": "cls_patch"}])
def test_dominant_and_contextual_tokens_and_cls(load, vision: dict[str, Any]):
    """A contextual token stands where its target was; CLS at the start, which is its own place if vanilla has it."""
    model, images = load(**vision)[1], pixels(1)
    tower = visionzip(model, 5, 2, positions="original", size_bias=True).get_vision_tower()
    kept = tower.compress(images).kept[0]
    image = model.placed_tokens(images)[0]
    first = 1 if tower.cls_token and tower.num_patches == 16 else 0  # position of what stands first
    assert image.places.tolist() == [max(0, position - first) for position in kept.tolist()]
    assert image.length == tower.num_patches
    assert image.sizes.sum() == 16 + tower.cls_token  # each patch once, and CLS


@pytest.mark.parametrize("merge_type", ["spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", [(112, 112), (112, 40), (50, 168), (56, 112)])
def test_tiles_stand_where_their_grid_has_them(load, size: tuple[int, int], merge_type: str):
    """Each kept patch has the place of the same patch among all, newlines counted; of padding, the nearest that is."""
    _, model, processor, _ = load(**NEXT | {"mm_patch_merge_type": merge_type})
    visionzip(model, keep=6, method="divprune", positions="original")
    tower = model.get_vision_tower()
    tiles = process_images([picture(0, size)], processor, model.config)
    image = model.placed_tokens(tiles, [size])[0]
    grid = model._layouts([len(tiles[0])], [size])[0].grid
    numbers = torch.arange(len(tiles[0]) * 16.0).view(-1, 16, 1) + 1  # as if each patch were its number
    newline = torch.zeros(1) if merge_type == "spatial_unpad" else None
    whole = lay_out_tiles(numbers, Layout(size, grid), 4, newline).flatten().tolist()
    assert image.length == len(whole)
    kept = (tower.encode(tiles[0], model._project).kept - 1 + torch.arange(len(tiles[0]))[:, None] * 16).flatten()
    there = [whole.index(number + 1) for number in kept.tolist() if number + 1 in whole]
    places = image.places.tolist()
    assert set(there) <= set(places) and max(places) < len(whole)
    if len(there) == len(kept):  # no padding was kept
        assert sorted(places) == sorted(there)
        assert places[6:] == sorted(places[6:])  # the order in which they are read


def test_families_with_one_place_a_patch(load_mgm, make_video_checkpoint):
    """Mini-Gemini's patches, and those of each frame of a video, whose vanilla tokens begin with CLS."""
    image = visionzip(load_mgm(), **PLUS).placed_tokens(large_pixels())[0]
    assert image.length == 16 and image.sizes.sum() == 16
    model = load_pretrained_model(str(make_video_checkpoint()), None, "video-llava")[1]
    frames = visionzip(model, **PLUS).placed_tokens([torch.randn(3, 2, 56, 56)])
    tower = model.get_video_tower()
    assert [frame.length for frame in frames] == [tower.num_patches] * 2
    for frame in frames:
        assert (frame.places >= tower.num_patches - 16).all() and (frame.places.diff() > 0).all()
    with torch.no_grad():
        ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 5]])
        assert model.generate(ids, images=[torch.randn(3, 2, 56, 56)], **GREEDY).shape == (1, 6)

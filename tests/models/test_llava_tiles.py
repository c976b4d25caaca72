"""LLaVA-NeXT's tiles, and projectors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from checkpoints import NEXT, pixels
from llava.mm_utils import process_images
from llava.model.multimodal_projector.builder import build_vision_projector
from visionzip import visionzip

SIZES = [(112, 50), (60, 200), (56, 56)]  # grids of 2 x 1, 1 x 3 and 1 x 2 tiles


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_tiles(load, merge_type: str):
    _, model, processor, _ = load(**NEXT | {"mm_patch_merge_type": merge_type})
    images = process_images([Image.new("RGB", size) for size in SIZES], processor, model.config)
    tiles = [len(image) for image in images]
    assert tiles == [3, 4, 3]
    vanilla = [len(tokens) for tokens in model.visual_tokens(images, SIZES)]
    if merge_type == "spatial_unpad":  # the whole image, and rows x (columns + newline) of what padding left over
        assert vanilla == [16 + 4 * (8 + 1), 16 + 12 * (4 + 1), 16 + 4 * (4 + 1)]
    else:
        assert vanilla == [16 * count for count in tiles]
    visionzip(model, dominant=5, contextual=2)
    assert [len(tokens) for tokens in model.visual_tokens(images, SIZES)] == [7 * count for count in tiles]


def test_tiles_of_one_image_are_compressed_alone_and_ordered_across_the_grid(load):
    """The order of the released code, for a 4 x 4 grid of patches: nothing is hard-wired to 24 x 24."""
    _, model, _, _ = load(**NEXT)
    model = visionzip(model, dominant=5, contextual=2)
    tiles = pixels(3)
    sequence = model.visual_tokens([tiles], [(112, 56)])[0]
    single = model.get_vision_tower().compress(tiles)
    tokens = model.get_model().mm_projector(single.tokens)
    kept = [
        (y, tile * 4 + x, tokens[1 + tile, position])
        for tile in range(2)
        for position, index in enumerate(single.dominant_indices[1 + tile].tolist())
        if position > 0
        for y, x in [divmod(index - 1, 4)]
    ]
    raster = [token for _, _, token in sorted(kept, key=lambda entry: entry[:2])]
    expected = [*tokens[0], *raster, tokens[1, 0], tokens[2, 0], *tokens[1, 5:], *tokens[2, 5:]]
    torch.testing.assert_close(sequence, torch.stack(expected))


def test_anyres_and_plain_images_in_one_list(load):
    _, model, _, _ = load(**NEXT)
    images, sizes = [pixels(1)[0], pixels(3)], [(56, 56), (112, 56)]
    assert [len(tokens) for tokens in model.visual_tokens(images, sizes)] == [16 + 1, 3 * 16 + 4]
    visionzip(model, dominant=5, contextual=2)
    assert [len(tokens) for tokens in model.visual_tokens(images, sizes)] == [7 + 1, 3 * 7]


def test_one_tile_keeps_its_newline(load):
    _, model, _, _ = load(**NEXT)
    newline = model.get_model().image_newline
    assert torch.equal(model.visual_tokens([pixels(1)[0]])[0][-1], newline)
    zipped = visionzip(model, dominant=5, contextual=2).visual_tokens([pixels(1)])[0]
    assert len(zipped) == 8 and torch.equal(zipped[-1], newline)


# Projectors


@pytest.mark.parametrize(("kind", "linears"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projectors(load, kind: str, linears: int):
    _, model, _, _ = load(mm_projector_type=kind)
    weights = [key for key in model.state_dict() if "mm_projector" in key and key.endswith("weight")]
    assert len(weights) == linears
    assert model.encode_images(pixels(2)).shape == (2, 16, 32)


def test_identity_projector(load):
    _, model, _, _ = load(mm_projector_type="identity")
    assert torch.equal(model.encode_images(pixels(1)), model.get_vision_tower()(pixels(1)))


@pytest.mark.parametrize(("kind", "width"), [("mlp0x_gelu", 32), ("qformer", 32), ("identity", 16)])
def test_unknown_projectors(kind: str, width: int):
    with pytest.raises(ValueError, match=kind):
        build_vision_projector(SimpleNamespace(mm_projector_type=kind, mm_hidden_size=32, hidden_size=width))

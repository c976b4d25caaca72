"""What the LLaVA models refuse: prompts, images and masks that do not fit, each with what is wrong named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from checkpoints import NEXT, pixels, spoilt_pixels
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape, process_images

IMG = IMAGE_TOKEN_INDEX


GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


ONE = [1, IMG, 7]


REFUSED = {
    "too many images": (ONE, lambda: pixels(2), "1 <image>.*2 images"),
    "too few images": ([1, IMG, IMG], lambda: pixels(1), "2 <image>.*1 images"),
    "images but no <image>": ([1, 7], lambda: pixels(1), "0 <image>.*1 images"),
    "<image> but no images": (ONE, lambda: None, "1 <image> but no images"),
    "raw pixels": (ONE, lambda: torch.zeros(1, 3, 56, 56, dtype=torch.uint8), "images are torch.uint8"),
    "another size in a list": (ONE, lambda: [pixels(1, edge=42)], r"images\[0\] has shape \(1, 3, 42, 42\)"),
    "an empty list": (ONE, list, "1 <image> but no images"),
    "NaN": ([1, IMG, IMG], lambda: spoilt_pixels(torch.nan), r"images\[1\] has 1 pixels that are NaN"),
    "infinity in a list": ([1, IMG, IMG], lambda: list(spoilt_pixels(torch.inf)), r"images\[1\] has 1 pixels"),
    "an id beyond the vocabulary": (
        [1, 7, 480],
        lambda: None,
        "the id 480 at position 2, .* 0 to 479, and",
    ),
    "an id of another sentinel": ([-7, IMG], lambda: pixels(1), "prompt 0 has the id -7 at position 0"),
    "no batch axis": (ONE, lambda: pixels(1)[0], r"shape \(3, 56, 56\).*images\[None\]"),
    "another size": (ONE, lambda: pixels(1, edge=42), r"\(B, 3, 56, 56\).*42"),
    "not an image": (ONE, lambda: [torch.zeros(56, 56)], r"images\[0\] has shape \(56, 56\)"),
    "empty tiles": (ONE, lambda: [torch.zeros(0, 3, 56, 56)], r"images\[0\] has shape \(0,"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(model, case: str):
    prompt, images, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([prompt]), images=images(), **GREEDY)


def test_ids_of_padding_may_be_any(model):
    prompt = torch.tensor([[-7, 1, IMG, 7]])
    found = model.generate(prompt, images=pixels(1), attention_mask=torch.tensor([[0, 1, 1, 1]]), **GREEDY)
    assert torch.equal(found, model.generate(prompt[:, 1:], images=pixels(1), **GREEDY))


def test_pil_images_are_refused(model):
    with pytest.raises(TypeError, match=r"images\[0\] is a Image, not a tensor.*process_images"):
        model.generate(torch.tensor([ONE]), images=[Image.new("RGB", (56, 56))], **GREEDY)
    with pytest.raises(TypeError, match="images is a Image, not a tensor or a list"):
        model.generate(torch.tensor([ONE]), images=Image.new("RGB", (56, 56)), **GREEDY)


@pytest.mark.parametrize("prompts", [torch.empty(0, 3, dtype=torch.long), torch.empty(1, 0, dtype=torch.long), None])
def test_empty_batches_are_refused(model, prompts: torch.Tensor | None):
    with pytest.raises(ValueError, match=r"prompts of shape \(B, L\) with B and L at least 1"):
        model.generate(prompts, images=pixels(1), **GREEDY)
    for images in (None, pixels(1)):
        with pytest.raises(ValueError, match=r"prompts of shape \(B, L\) with B and L at least 1"):
            model(prompts, images=images)


def test_masks_are_checked(model):
    prompts = torch.tensor([ONE, ONE])
    with pytest.raises(ValueError, match=r"shape \(2, 2\), but they have \(2, 3\)"):
        model.generate(prompts, images=pixels(2), attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        model(prompts, images=pixels(2), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_no_images_are_refused(model):
    with pytest.raises(ValueError, match=r"B >= 1, got \(0, 3, 56, 56\)"):
        model.get_vision_tower()(pixels(0))
    with pytest.raises(ValueError, match="images is empty"):
        model.visual_tokens([])


def test_tiles_are_checked_against_the_image_size(load):
    _, model, _, _ = load(**NEXT)
    with pytest.raises(ValueError, match="3 tiles: give image_sizes"):
        model.visual_tokens([pixels(3)])
    with pytest.raises(ValueError, match="grid of 2 x 1 tiles and the whole image, 3 in all, but comes as 4"):
        model.visual_tokens([pixels(4)], [(112, 56)])
    with pytest.raises(ValueError, match="1 entries for 2 images"):
        model.visual_tokens([pixels(3), pixels(3)], [(112, 56)])
    with pytest.raises(ValueError, match="mm_patch_merge_type='rows' is unknown"):
        model.config.mm_patch_merge_type = "rows"
        model.visual_tokens([pixels(3)], [(112, 56)])
    model.config.mm_patch_merge_type = "spatial_unpad"
    model.config.image_grid_pinpoints = None
    with pytest.raises(ValueError, match="image_grid_pinpoints=None"):
        model.visual_tokens([pixels(3)], [(112, 56)])


def test_unpadding_needs_a_newline(model):
    model.config.mm_patch_merge_type = "spatial_unpad"
    with pytest.raises(ValueError, match=r"needs model\.image_newline"):
        model.visual_tokens([pixels(1)])


def test_what_is_not_an_image_is_refused():
    with pytest.raises(TypeError, match=r"images\[1\] is a str"):
        process_images([Image.new("RGB", (8, 8)), "cat.png"], None, SimpleNamespace())
    with pytest.raises(ValueError, match="images is empty"):
        process_images([], None, SimpleNamespace())
    with pytest.raises(ValueError, match="image_aspect_ratio='anyres_max_9' is not supported"):
        process_images([Image.new("RGB", (8, 8))], None, SimpleNamespace(image_aspect_ratio="anyres_max_9"))


@pytest.mark.parametrize("pinpoints", [None, [], "(1x1),...,(6x6)", [336]])
def test_grids_need_resolutions(pinpoints: Any):
    with pytest.raises(ValueError, match=r"image_grid_pinpoints=.* lists no resolutions"):
        get_anyres_image_grid_shape((8, 8), pinpoints, 336)

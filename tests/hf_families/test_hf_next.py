"""``visionzip`` on transformers' own ``LlavaNextForConditionalGeneration``: each tile is compressed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import (
    EDGE,
    IMAGE,
    content,
    llava_next,
    next_processor,
    pictures,
)
from hf_plain import plain_answers, plain_encode, plain_logits, plain_rows, plain_tiles, plain_zip
from torch import Tensor

from visionzip import unzip, visionzip

K, M = 5, 2
SIDE = 4  # patches along the edge of a tile
TEXTS = ["what is <image> here", "<image> and <image>", "no picture"]
IMAGES = pictures((90, 60), (60, 150), (56, 56))  # width, height
GRIDS = [(2, 2), (3, 1), (1, 2)]  # rows and columns of tiles that these sizes make
# The whole image, and the grid without padding with a newline for each row of patches.
FULL = [16 + 6 * (8 + 1), 16 + 10 * (4 + 1), 16 + 4 * (4 + 1)]


@pytest.fixture
def model() -> Any:
    return visionzip(llava_next(), K, M)


def batch(side: str = "left") -> Any:
    return next_processor(side)(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")


def tiles(grid: tuple[int, int]) -> int:
    return 1 + grid[0] * grid[1]


def reference_image(model: Any, image: Tensor, grid: tuple[int, int], cls_token: bool = True) -> Tensor:
    """Features of one image (tiles, 3, h, w) with its grid of (rows, columns)."""
    zipped = plain_zip(*plain_encode(model.model.vision_tower, image[: tiles(grid)]), K, M)
    return model.model.multi_modal_projector(plain_tiles(zipped, grid[1], SIDE, M, cls_token))


def reference_rows(model: Any, inputs: Any) -> list[Tensor]:
    features = [reference_image(model, image, grid) for image, grid in zip(inputs["pixel_values"], GRIDS, strict=True)]
    return plain_rows(model, inputs, list(zip(FULL, features, strict=True)))


def answers(model: Any, inputs: Any, **options: Any) -> Tensor:
    out = model.generate(**inputs, **{"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options})
    return out[:, inputs["input_ids"].shape[1] :]


def test_each_tile_keeps_its_budget(model: Any):
    """5 tiles of 7 tokens, 4 and 3; the stock processor wrote 70, 66 and 36 placeholders."""
    inputs = batch()
    assert int((inputs["input_ids"] == IMAGE).sum()) == sum(FULL)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    assert [len(image) for image in features.pooler_output] == [tiles(grid) * (K + M) for grid in GRIDS]
    assert features.last_hidden_state.shape == (sum(map(tiles, GRIDS)), K + M, 32)
    for image, pixels, grid in zip(features.pooler_output, inputs["pixel_values"], GRIDS, strict=True):
        torch.testing.assert_close(image, reference_image(model, pixels, grid), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows_alone(side: str, model: Any):
    inputs = batch(side)
    rows = reference_rows(model, inputs)
    words = [len(content(inputs, row)) for row in range(3)]
    lengths = [words[0] - FULL[0] + 35, words[1] - FULL[1] - FULL[2] + 28 + 21, words[2]]
    assert [len(row) for row in rows] == lengths
    output = model(**inputs)
    assert output.logits.shape[1] == output.past_key_values.get_seq_length() == max(lengths)
    for row, length, embeddings in zip(output.logits, lengths, rows, strict=True):
        own = row[-length:] if side == "left" else row[:length]
        torch.testing.assert_close(own, plain_logits(model, embeddings), atol=1e-4, rtol=1e-4)
    assert answers(model, inputs).tolist() == [answer for row in rows for answer in plain_answers(model, row, 5)]


def test_tiles_of_all_images_one_after_the_other(model: Any):
    """``pixel_values`` without filling, (tiles, 3, h, w), as transformers takes it too."""
    inputs = batch()
    pixels = torch.cat([image[: tiles(grid)] for image, grid in zip(inputs["pixel_values"], GRIDS, strict=True)])
    assert torch.equal(answers(model, {**inputs, "pixel_values": pixels}), answers(model, inputs))


def test_beams_and_the_cache(model: Any):
    inputs = batch()
    out = model.generate(
        **inputs, max_new_tokens=4, num_beams=2, num_return_sequences=2, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, 0))
    alone = next_processor()(images=IMAGES[:1], text=TEXTS[:1], return_tensors="pt")
    greedy = model.generate(**alone, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert greedy.past_key_values.get_seq_length() == alone["input_ids"].shape[1] - FULL[0] + 35 + 3 - 1


def test_siglip_has_no_cls_token():
    """And its stock processor adds no token for one."""
    model = visionzip(llava_next(siglip=True), K, M)
    processor = next_processor(num_additional_image_tokens=0, vision_feature_select_strategy="full")
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    output = model(**inputs)
    assert output.image_hidden_states.shape[0] == sum(map(tiles, GRIDS)) * (K + M)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    for image, pixels, grid in zip(features, inputs["pixel_values"], GRIDS, strict=True):
        expected = reference_image(model, pixels, grid, cls_token=False)
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)
        assert len(image) == tiles(grid) * (K + M)


@pytest.mark.filterwarnings("ignore:dominant")
def test_a_budget_may_need_more_placeholders_than_there_were():
    """All 17 tokens of each tile: 85, where the model itself had 70 after unpadding."""
    model = visionzip(llava_next(), 17, 0)
    inputs = next_processor()(images=IMAGES[:1], text=TEXTS[:1], return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE).sum()) == FULL[0]
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - FULL[0] + 5 * 17
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    assert model(**inputs, labels=labels).loss.isfinite()
    assert answers(model, inputs).shape == (1, 5)


def test_unzip_restores_everything(model: Any):
    inputs = batch()
    plain = llava_next()
    expected = [plain(**inputs).logits, answers(plain, inputs)]
    assert not torch.equal(answers(model, inputs), expected[1])
    unzip(model)
    assert torch.equal(model(**inputs).logits, expected[0]) and torch.equal(answers(model, inputs), expected[1])


WRONG = [
    (
        lambda inputs: {**inputs, "image_sizes": torch.tensor([[60, 90], [56, 56], [150, 60]])},
        r"prompt 1 has a run of 66 image placeholders .* where this model takes 36 \+ 66 \(image 1 of the batch",
    ),
    (
        lambda inputs: {**inputs, "image_sizes": torch.tensor([[60, 90], [150, 60]])},
        r"image_sizes must have \(height, width\) of each image, 2 for 3 images",
    ),
    (
        lambda inputs: {key: value for key, value in inputs.items() if key != "image_sizes"},
        r"image_sizes .* none for 3 images",
    ),
    (
        lambda inputs: {**inputs, "pixel_values": inputs["pixel_values"][:, :3]},
        r"the images' sizes make \[5, 4, 3\] tiles, but pixel_values has \(3, 3, 3, 56, 56\)",
    ),
    (
        lambda inputs: {**inputs, "pixel_values": inputs["pixel_values"][..., :42, :42]},
        r"pixel_values must be \(N, tiles, 3, 56, 56\) for this model, got \(3, 5, 3, 42, 42\)",
    ),
    (
        lambda inputs: {**inputs, "input_ids": inputs["input_ids"][:, :-20]},
        r"prompt 1 has a run of 16 image placeholders .* where this model takes 36 .*do not truncate it",
    ),
]


@pytest.mark.parametrize("change, message", WRONG)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_what_does_not_fit(change: Any, message: str, call: str, model: Any):
    inputs = batch("right")
    inputs = change({**inputs})
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(**inputs)


def test_a_processor_with_other_pinpoints(model: Any):
    processor = next_processor()
    processor.image_processor.image_grid_pinpoints = [[2 * EDGE, EDGE], [EDGE, 2 * EDGE], [4 * EDGE, 4 * EDGE]]
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"prompt . has a run of .* it is of another model"):
        model(**inputs)

"""VisionZip on transformers' LLaVA-OneVision: SigLIP has no CLS token; videos are pooled as the model pools them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import VIDEO
from hf_plain import (
    Run,
    check_answers,
    plain_encode,
    plain_logits,
    plain_loss,
    plain_rows,
    plain_tiles,
    plain_zip,
    text_labels,
    without_the_last_token,
)
from hf_video_models import build, processor_for, video
from torch import Tensor

from checkpoints import picture
from visionzip import visionzip

EDGE, SIDE = 70, 5  # 25 patches; pooled frames are 3 x 3, as 27 x 27 are 14 x 14
FRAME = 9
K, M = 4, 2
START = "s"  # stands for the one token before a prompt; each letter is a token too
GRIDS = {(90, 60): 2, (60, 90): 1, (90, 90): 2, (300, 90): 3}  # columns of tiles for images of (width, height)
TILES = {(90, 60): 3, (60, 90): 3, (90, 90): 5, (300, 90): 4}  # the whole image included


@pytest.fixture
def model() -> Any:
    return build("onevision", edge=EDGE)


@pytest.fixture
def processor() -> Any:
    return processor_for("onevision", edge=EDGE)


@pytest.fixture
def sizes() -> list[tuple[int, int]]:
    return [(90, 60), (60, 90), (300, 90)]


@pytest.fixture
def mixed(processor: Any, sizes: list[tuple[int, int]]) -> Any:
    """Rows of different length: two images; a video of 3 frames; text; an image and a video."""
    text = ["<image> and <image>?", "<video>", "no picture at all here", "<video>: is it <image>"]
    images = [picture(seed, size) for seed, size in enumerate(sizes)]
    return processor(text=text, images=images, videos=[video(0), video(1)], padding=True, return_tensors="pt")


def pooled(patches: Tensor) -> Tensor:
    """The model's pooling of one frame's patches (N, D)."""
    field = patches.T.reshape(1, -1, SIDE, SIDE)
    half = (SIDE + 1) // 2
    return torch.nn.functional.interpolate(field, size=(half, half), mode="bilinear")[0].flatten(1).T


def plain_features(model: Any, inputs: Any, sizes: list[tuple[int, int] | None]) -> dict[str, list[Run]]:
    """What takes the place of each run of placeholders: encoder with eager attention, explicit selection, projector.

    A size is None for one of several images of a sample, which stays in one tile.
    """
    tower, project, newline = model.model.vision_tower, model.model.multi_modal_projector, model.model.image_newline
    images, videos = [], []
    for index, size in enumerate(sizes):
        tiles = inputs["pixel_values"][index]
        tiles = tiles[: TILES[size] if size else 1]
        zipped = plain_zip(*plain_encode(tower, tiles, -1), K, M)
        if size is None:
            images.append((SIDE * SIDE + 1, torch.cat([project(zipped[0][0]), newline[None]])))
        else:
            run = model.get_image_features(tiles[None], inputs["image_sizes"][index : index + 1]).pooler_output[0]
            images.append((len(run), project(plain_tiles(zipped, GRIDS[size], SIDE, M, False))))
    for frames in inputs.get("pixel_values_videos", ()):
        tokens = []
        for hidden, score, key in zip(*plain_encode(tower, frames, -1), strict=True):
            field = pooled(project(hidden))[None]
            tokens.append(plain_zip(field, pooled(score[:, None]).T, pooled(key)[None], K, M)[0][0])
        videos.append((FRAME * len(frames) + 1, torch.cat([*tokens, newline[None]])))
    return {"images": images, "videos": videos}


@torch.no_grad()
def test_images_and_videos_of_a_batch_equal_the_plain_method(model: Any, mixed: Any, sizes: list[tuple[int, int]]):
    features = plain_features(model, mixed, sizes)
    rows = plain_rows(model, mixed, **features)
    output = visionzip(model, K, M)(**mixed)
    expected = torch.cat([run for _, run in features["images"]])
    torch.testing.assert_close(output.image_hidden_states, expected, atol=1e-4, rtol=1e-5)
    expected = torch.cat([run for _, run in features["videos"]])
    torch.testing.assert_close(output.video_hidden_states, expected, atol=1e-4, rtol=1e-5)
    assert output.logits.shape[1] == max(len(row) for row in rows) == output.past_key_values.get_seq_length()
    for logits, row in zip(output.logits, rows, strict=True):  # padded on the left
        torch.testing.assert_close(logits[-len(row) :], plain_logits(model, row), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", GRIDS)
def test_counts_per_tile_and_per_frame(model: Any, processor: Any, size: tuple[int, int]):
    inputs = processor(text="<video>, <image>", videos=[video(0, 4)], images=picture(0, size), return_tensors="pt")
    output = visionzip(model, K, M)(**inputs)
    expected = len(START + ", ") + 4 * (K + M) + 1 + TILES[size] * (K + M)  # a newline ends the video
    assert output.logits.shape[1] == output.past_key_values.get_seq_length() == expected


@torch.no_grad()
def test_several_images_of_a_sample_have_one_tile_each(model: Any, processor: Any):
    images = [[picture(0)], [picture(1), picture(2, (60, 90))]]
    text = ["<image>", "<image> or <image>"]
    inputs = processor(text=text, images=images, padding=True, return_tensors="pt")
    assert inputs["batch_num_images"].tolist() == [1, 2]
    rows = plain_rows(model, inputs, **plain_features(model, inputs, [(90, 60), None, None]))
    output = visionzip(model, K, M)(**inputs)
    assert [len(row) for row in rows] == [len(START) + 3 * (K + M), len(START + " or ") + 2 * (K + M + 1)]
    for logits, row in zip(output.logits, rows, strict=True):
        torch.testing.assert_close(logits[-len(row) :], plain_logits(model, row), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tiles_beyond_the_models_limit_are_not_interpolated():
    """anyres_max_2: the model shrinks the 10 x 10 patches of four tiles to 7 x 7; zipped tiles stay what they are."""
    model = build("onevision", edge=EDGE, vision_aspect_ratio="anyres_max_2")
    processor = processor_for("onevision", edge=EDGE, vision_aspect_ratio="anyres_max_2")
    inputs = processor(text="<image>", images=picture(0, (90, 90)), return_tensors="pt")
    assert inputs["input_ids"].shape[1] == len(START) + SIDE * SIDE + 7 * (7 + 1)
    (row,) = plain_rows(model, inputs, **plain_features(model, inputs, [(90, 90)]))
    output = visionzip(model, K, M)(**inputs)
    assert output.logits.shape[1] == len(row) == len(START) + 5 * (K + M)
    torch.testing.assert_close(output.logits[0], plain_logits(model, row), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_default_at_the_released_models_resolution():
    """54 + 10 of the encoder's last layer, which is the one that the projector was trained on."""
    model, processor = build("onevision", edge=384), processor_for("onevision", edge=384)
    image = picture(0, (600, 300))  # 2 tiles and the whole image
    inputs = processor(text="<video>, <image>", videos=[video(0, 2)], images=image, return_tensors="pt")
    assert (inputs["input_ids"] == VIDEO).sum() == 2 * 14 * 14 + 1
    output = visionzip(model)(**inputs)
    assert model.config.visionzip == {"dominant": 54, "contextual": 10, "layer": -1, "merge": "released"}
    assert output.logits.shape[1] == len(START + ", ") + 2 * 64 + 1 + 3 * 64


def test_another_layer_warns(model: Any):
    with pytest.warns(UserWarning, match="trained on the hidden states of layer -1"):
        visionzip(model, 4, 2, layer=-2)


@torch.no_grad()
def test_an_encoder_with_cls_keeps_it_in_every_frame(processor: Any):
    model = build("onevision", edge=EDGE, siglip=False, vision_feature_select_strategy="default")
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    full = model(**inputs).video_hidden_states[:-1].view(3, FRAME, -1)
    with pytest.warns(UserWarning, match="pools a frame to 10: no video"):
        visionzip(model, 1 + FRAME, 0)
    zipped = model(**inputs).video_hidden_states[:-1].view(3, 1 + FRAME, -1)
    torch.testing.assert_close(zipped[:, 1:], full, atol=1e-4, rtol=1e-5)
    assert visionzip(model, K, M)(**inputs).logits.shape[1] == len(START) + 3 * (K + M) + 1


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_equal_the_plain_method(model: Any, mixed: Any, sizes: list[tuple[int, int]], beams: int):
    rows = plain_rows(model, mixed, **plain_features(model, mixed, sizes))
    check_answers(visionzip(model, K, M), mixed, rows, beams)


@torch.no_grad()
def test_a_budget_of_all_tokens_leaves_videos_as_they_are(model: Any, processor: Any):
    inputs = processor(text="<video> <video>", videos=[video(0), video(1)], return_tensors="pt")
    full = model(**inputs).logits
    with pytest.warns(UserWarning, match="pools a frame to 9: no video"):
        visionzip(model, FRAME, 0)
    torch.testing.assert_close(model(**inputs).logits, full, atol=1e-5, rtol=1e-5)


def test_the_loss_counts_the_labelled_text(model: Any):
    processor = processor_for("onevision", edge=EDGE, padding_side="right")
    text = ["<image> is noise", "<video> moves"]
    inputs = processor(text=text, images=picture(0), videos=[video(0)], padding=True, return_tensors="pt")
    labels = text_labels(inputs)
    expected = plain_loss(model, inputs, labels, **plain_features(model, inputs, [(90, 60)]))
    loss = visionzip(model, K, M)(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.model.image_newline.grad.abs().sum() > 0


def test_inputs_of_another_model_are_refused(model: Any, processor: Any):
    visionzip(model, K, M)
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    fewer = without_the_last_token(inputs)
    with pytest.raises(ValueError, match="video"):
        model(**fewer)
    with pytest.raises(ValueError, match="video"):
        model.generate(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :2]}, max_new_tokens=2)
    smaller = processor_for("onevision", edge=56)(text="<video>", videos=[video(0)], return_tensors="pt")
    with pytest.raises(ValueError, match="70"):
        model(**smaller)
    other_limit = processor_for("onevision", edge=EDGE, vision_aspect_ratio="anyres_max_2")
    with pytest.raises(ValueError, match="image"):
        model(**other_limit(text="<image>", images=picture(0, (90, 90)), return_tensors="pt"))

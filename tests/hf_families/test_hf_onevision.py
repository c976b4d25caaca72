"""LLaVA-OneVision's own: several images of a sample, a limit of tiles, its layer, and encoders with and without CLS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import VIDEO
from hf_plain import plain_logits, plain_rows
from hf_plain_videos import K, M, onevision_features
from hf_video_models import build, processor_for, video

from checkpoints import picture
from visionzip import visionzip

EDGE, SIDE = 70, 5  # 25 patches; pooled frames are 3 x 3, as 27 x 27 are 14 x 14
FRAME = 9
START = "s"  # stands for the one token before a prompt; each letter is a token too


@pytest.fixture
def model() -> Any:
    return build("onevision", edge=EDGE)


@pytest.fixture
def processor() -> Any:
    return processor_for("onevision", edge=EDGE)


@torch.no_grad()
def test_several_images_of_a_sample_have_one_tile_each(model: Any, processor: Any):
    images = [[picture(0)], [picture(1), picture(2, (60, 90))]]
    text = ["<image>", "<image> or <image>"]
    inputs = processor(text=text, images=images, padding=True, return_tensors="pt")
    assert inputs["batch_num_images"].tolist() == [1, 2]
    rows = plain_rows(model, inputs, **onevision_features(model, inputs, [(90, 60), None, None]))
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
    (row,) = plain_rows(model, inputs, **onevision_features(model, inputs, [(90, 90)]))
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
def test_a_budget_of_all_tokens_leaves_videos_as_they_are(model: Any, processor: Any):
    inputs = processor(text="<video> <video>", videos=[video(0), video(1)], return_tensors="pt")
    full = model(**inputs).logits
    with pytest.warns(UserWarning, match="pools a frame to 9: no video"):
        visionzip(model, FRAME, 0)
    torch.testing.assert_close(model(**inputs).logits, full, atol=1e-5, rtol=1e-5)

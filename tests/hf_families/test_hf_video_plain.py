"""VisionZip on each of transformers' video families equals the plain method: tiles of images, frames of videos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_plain import check_answers, plain_logits, plain_loss, plain_rows, text_labels, without_the_last_token
from hf_plain_videos import PLAIN, TILES, K, M
from hf_video_models import build, processor_for, video

from checkpoints import picture
from visionzip import visionzip

START = "s"  # stands for the one token before a prompt; each letter is a token too
SIZES = [(90, 60), (300, 90), (90, 90)]


@pytest.fixture(params=PLAIN)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return build(family, edge=PLAIN[family].edge)


@pytest.fixture
def processor(family: str) -> Any:
    return processor_for(family, edge=PLAIN[family].edge)


@pytest.fixture
def mixed(processor: Any) -> Any:
    """Rows of different length: two images; a video of 3 frames; text; an image and a video."""
    text = ["<image> and <image>?", "<video>", "no picture at all here", "<video>: is it <image>"]
    images = [picture(seed, size) for seed, size in enumerate(SIZES)]
    return processor(text=text, images=images, videos=[video(0), video(1)], padding=True, return_tensors="pt")


POOLING = [("next_video", {"spatial_pool_mode": mode}) for mode in ("average", "max", "conv")]


@torch.no_grad()
@pytest.mark.parametrize(("family", "config"), [*POOLING, ("onevision", {}), ("video_llava", {})], ids=str)
def test_images_and_videos_of_a_batch_equal_the_plain_method(family: str, config: dict[str, Any], mixed: Any):
    model = build(family, edge=PLAIN[family].edge, **config)
    features = PLAIN[family].features(model, mixed, SIZES)
    rows = plain_rows(model, mixed, **features)
    output = visionzip(model, K, M)(**mixed)
    for found, runs in ((output.image_hidden_states, "images"), (output.video_hidden_states, "videos")):
        expected = torch.cat([run for _, run in features[runs]])
        torch.testing.assert_close(found.view_as(expected), expected, atol=1e-4, rtol=1e-5)
    assert output.logits.shape[1] == max(len(row) for row in rows) == output.past_key_values.get_seq_length()
    for logits, row in zip(output.logits, rows, strict=True):  # padded on the left
        torch.testing.assert_close(logits[-len(row) :], plain_logits(model, row), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "size"),
    [*((name, size) for name in PLAIN if PLAIN[name].tiled for size in TILES), ("video_llava", (90, 60))],
)
def test_counts_per_tile_and_per_frame(family: str, model: Any, processor: Any, size: tuple[int, int]):
    inputs = processor(text="<video>, <image>", videos=[video(0, 4)], images=picture(0, size), return_tensors="pt")
    output = visionzip(model, K, M)(**inputs)
    tiles = TILES[size] if PLAIN[family].tiled else 1
    expected = len(START + ", ") + 4 * (K + M) + PLAIN[family].newline + tiles * (K + M)
    assert output.logits.shape[1] == output.past_key_values.get_seq_length() == expected


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_equal_the_plain_method(family: str, model: Any, mixed: Any, beams: int):
    rows = plain_rows(model, mixed, **PLAIN[family].features(model, mixed, SIZES))
    check_answers(visionzip(model, K, M), mixed, rows, beams)


def test_the_loss_counts_the_labelled_text(family: str, model: Any):
    processor = processor_for(family, edge=PLAIN[family].edge, padding_side="right")
    text = ["<image> is noise", "<video> moves"]
    inputs = processor(text=text, images=picture(0), videos=[video(0)], padding=True, return_tensors="pt")
    labels = text_labels(inputs)
    expected = plain_loss(model, inputs, labels, **PLAIN[family].features(model, inputs, [(90, 60)]))
    loss = visionzip(model, K, M)(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    if PLAIN[family].newline:
        assert model.model.image_newline.grad.abs().sum() > 0


def test_placeholders_of_another_model_are_refused(family: str, model: Any, processor: Any):
    visionzip(model, K, M)
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    fewer = without_the_last_token(inputs)
    shorter = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :2]}
    for wrong in (fewer, shorter):
        with pytest.raises(ValueError, match="video"):
            model(**wrong)
        with pytest.raises(ValueError, match="video"):
            model.generate(**wrong, max_new_tokens=2)
    other = processor_for(family, edge=PLAIN[family].edge, **PLAIN[family].other)
    with pytest.raises(ValueError, match="image"):
        model(**other(text="<image>", images=picture(0, (90, 90)), return_tensors="pt"))


@pytest.mark.parametrize("family", ["next_video", "onevision"])
def test_frames_of_another_size_are_refused(family: str, model: Any):
    smaller = processor_for(family, edge=56)(text="<video>", videos=[video(0)], return_tensors="pt")
    with pytest.raises(ValueError, match=str(PLAIN[family].edge)):
        visionzip(model, K, M)(**smaller)

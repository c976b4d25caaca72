"""VisionZip on transformers' VideoLlava: every image and every frame of a video is compressed alone."""

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
    plain_zip,
    text_labels,
    without_the_last_token,
)
from hf_video_models import build, processor_for, video
from torch import Tensor

from checkpoints import picture
from visionzip import visionzip

IMAGE_RUN, FRAME = 16, 17  # placeholders that the stock processor writes: the frames of a video keep CLS
K, M = 4, 2
START = "s"  # stands for the one token before a prompt; each letter is a token too


@pytest.fixture
def model() -> Any:
    return build("video_llava")


@pytest.fixture
def processor() -> Any:
    return processor_for("video_llava")


@pytest.fixture
def mixed(processor: Any) -> Any:
    """Rows of different length: two images; a video of 3 frames; text; an image and a video."""
    text = ["<image> and <image>?", "<video>", "no picture at all here", "<video>: is it <image>"]
    videos = [video(0), video(1)]
    return processor(text=text, images=[picture(i) for i in range(3)], videos=videos, padding=True, return_tensors="pt")


def plain_features(model: Any, inputs: Any) -> dict[str, list[Run]]:
    """What takes the place of each run of placeholders: encoder with eager attention, explicit selection, projector."""

    def zipped(tower: Any, pixels: Tensor) -> list[Tensor]:
        encoded = plain_encode(tower, pixels)
        return [model.model.multi_modal_projector(tokens) for tokens, _ in plain_zip(*encoded, K, M)]

    images = zipped(model.model.image_tower, inputs["pixel_values_images"])
    videos = [zipped(model.model.video_tower, frames) for frames in inputs["pixel_values_videos"]]
    return {
        "images": [(IMAGE_RUN, tokens) for tokens in images],
        "videos": [(FRAME * len(frames), torch.cat(frames)) for frames in videos],
    }


@torch.no_grad()
def test_images_and_videos_of_a_batch_equal_the_plain_method(model: Any, mixed: Any):
    features = plain_features(model, mixed)
    rows = plain_rows(model, mixed, **features)
    output = visionzip(model, K, M)(**mixed)
    expected = torch.cat([run for _, run in features["images"]])
    torch.testing.assert_close(output.image_hidden_states.flatten(0, 1), expected, atol=1e-4, rtol=1e-5)
    expected = torch.cat([run for _, run in features["videos"]])
    torch.testing.assert_close(output.video_hidden_states.flatten(0, 1), expected, atol=1e-4, rtol=1e-5)
    assert output.logits.shape[1] == max(len(row) for row in rows) == output.past_key_values.get_seq_length()
    for logits, row in zip(output.logits, rows, strict=True):  # padded on the left
        torch.testing.assert_close(logits[-len(row) :], plain_logits(model, row), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_counts_per_image_and_per_frame(model: Any, processor: Any):
    inputs = processor(text="<video>, <image>", videos=[video(0, frames=4)], images=picture(0), return_tensors="pt")
    assert inputs["input_ids"].shape[1] == len(START + ", ") + 4 * FRAME + IMAGE_RUN
    output = visionzip(model, K, M)(**inputs)
    expected = len(START + ", ") + 4 * (K + M) + (K + M)
    assert output.logits.shape[1] == output.past_key_values.get_seq_length() == expected


@torch.no_grad()
def test_the_default_at_the_released_models_resolution():
    """17 tokens of each of 8 frames are 136, as in the paper's Table 3."""
    model, processor = build("video_llava", edge=224), processor_for("video_llava", edge=224)
    inputs = processor(text="<video>", videos=[video(0, frames=8)], return_tensors="pt")
    assert (inputs["input_ids"] == VIDEO).sum() == 8 * 257
    output = visionzip(model)(**inputs)
    assert model.config.visionzip == {"dominant": 15, "contextual": 2, "layer": -2, "merge": "released"}
    assert output.logits.shape[1] == len(START) + 136


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_equal_the_plain_method(model: Any, mixed: Any, beams: int):
    rows = plain_rows(model, mixed, **plain_features(model, mixed))
    check_answers(visionzip(model, K, M), mixed, rows, beams)


def test_the_loss_counts_the_labelled_text(model: Any):
    processor = processor_for("video_llava", padding_side="right")
    text = ["<image> is noise", "<video> moves"]
    inputs = processor(text=text, images=picture(0), videos=[video(0)], padding=True, return_tensors="pt")
    labels = text_labels(inputs)
    expected = plain_loss(model, inputs, labels, **plain_features(model, inputs))
    loss = visionzip(model, K, M)(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_pixels_have_an_old_and_a_new_name(model: Any, processor: Any):
    inputs = processor(text="<image>", images=picture(0), return_tensors="pt")
    former = visionzip(model, K, M)(**inputs).logits
    features = model.model.get_image_features(pixel_values_images=inputs["pixel_values_images"]).pooler_output
    assert features.shape == (1, K + M, 32)
    inputs["pixel_values"] = inputs.pop("pixel_values_images")
    assert torch.equal(model(**inputs).logits, former)


def test_placeholders_that_fit_no_video_are_refused(model: Any, processor: Any):
    visionzip(model, K, M)
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    fewer = without_the_last_token(inputs)
    with pytest.raises(ValueError, match="video"):
        model(**fewer)
    with pytest.raises(ValueError, match="video"):
        model.generate(**fewer, max_new_tokens=2)
    with pytest.raises(ValueError, match="video"):
        model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :2]})
    without = {key: value for key, value in inputs.items() if "pixel" not in key}
    with pytest.raises(ValueError, match="video"):
        model(**without)
    image = processor_for("video_llava", num_additional_image_tokens=0)(
        text="<image>", images=picture(0), return_tensors="pt"
    )
    with pytest.raises(ValueError, match="image"):
        model(**image)

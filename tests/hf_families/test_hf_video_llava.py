"""VideoLlava's own: the paper's budget of a video, and two names of an image's pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import VIDEO
from hf_plain_videos import K, M
from hf_video_models import build, processor_for, video

from checkpoints import picture
from visionzip import visionzip

START = "s"  # stands for the one token before a prompt; each letter is a token too


@pytest.fixture
def model() -> Any:
    return build("video_llava")


@pytest.fixture
def processor() -> Any:
    return processor_for("video_llava")


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
def test_pixels_have_an_old_and_a_new_name(model: Any, processor: Any):
    inputs = processor(text="<image>", images=picture(0), return_tensors="pt")
    assert inputs["input_ids"].shape[1] == len(START) + 16  # an image is written without CLS, a frame with it
    former = visionzip(model, K, M)(**inputs).logits
    features = model.model.get_image_features(pixel_values_images=inputs["pixel_values_images"]).pooler_output
    assert features.shape == (1, K + M, 32)
    inputs["pixel_values"] = inputs.pop("pixel_values_images")
    assert torch.equal(model(**inputs).logits, former)


def test_placeholders_without_their_video_are_refused(model: Any, processor: Any):
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    without = {key: value for key, value in inputs.items() if "pixel" not in key}
    with pytest.raises(ValueError, match="video"):
        visionzip(model, K, M)(**without)

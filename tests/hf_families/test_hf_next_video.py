"""LLaVA-NeXT-Video's own: frames of videos are compressed after the model's own pooling, and CLS is kept for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import VIDEO
from hf_video_models import build, processor_for, video

from checkpoints import picture
from visionzip import visionzip

EDGE, FRAME = 84, 9  # 36 patches and CLS; the 9 patches of a pooled frame
START = "s"  # stands for the one token before a prompt; each letter is a token too


@pytest.fixture
def model() -> Any:
    return build("next_video", edge=EDGE)


@pytest.fixture
def processor() -> Any:
    return processor_for("next_video", edge=EDGE)


@torch.no_grad()
def test_the_default_at_the_released_models_resolution():
    model, processor = build("next_video", edge=336), processor_for("next_video", edge=336)
    image = picture(0, (600, 300))  # 2 tiles and the whole image
    inputs = processor(text="<video>, <image>", videos=[video(0, 2)], images=image, return_tensors="pt")
    assert (inputs["input_ids"] == VIDEO).sum() == 2 * 12 * 12
    output = visionzip(model)(**inputs)
    assert model.config.visionzip == {"dominant": 54, "contextual": 10, "layer": -2, "merge": "released"}
    assert output.logits.shape[1] == len(START + ", ") + 2 * 64 + 3 * 64


@torch.no_grad()
def test_a_budget_of_all_tokens_compresses_nothing(model: Any, processor: Any):
    """A pooled frame has 9 patches, and CLS, which the model alone drops."""
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    full = model(**inputs).video_hidden_states.view(3, FRAME, -1)
    with pytest.warns(UserWarning, match="pools a frame to 10: no video"):
        visionzip(model, FRAME, 1)
    zipped = model(**inputs).video_hidden_states.view(3, FRAME + 1, -1)
    torch.testing.assert_close(zipped[:, 1:], full, atol=1e-5, rtol=1e-5)

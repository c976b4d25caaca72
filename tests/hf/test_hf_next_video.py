"""VisionZip on transformers' LLaVA-NeXT-Video: tiles of images, and frames of videos after the model's own pooling."""

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

EDGE, SIDE = 84, 6  # 36 patches and CLS; the 9 patches of a pooled frame
FRAME = 9
K, M = 4, 2
START = "s"  # stands for the one token before a prompt; each letter is a token too
GRIDS = {(90, 60): 2, (60, 90): 1, (90, 90): 2, (300, 90): 3}  # columns of tiles for images of (width, height)
TILES = {(90, 60): 3, (60, 90): 3, (90, 90): 5, (300, 90): 4}  # the whole image included


@pytest.fixture
def model() -> Any:
    return build("next_video", edge=EDGE)


@pytest.fixture
def processor() -> Any:
    return processor_for("next_video", edge=EDGE)


@pytest.fixture
def sizes() -> list[tuple[int, int]]:
    return [(90, 60), (300, 90), (90, 90)]


@pytest.fixture
def mixed(processor: Any, sizes: list[tuple[int, int]]) -> Any:
    """Rows of different length: two images; a video of 3 frames; text; an image and a video."""
    text = ["<image> and <image>?", "<video>", "no picture at all here", "<video>: is it <image>"]
    images = [picture(seed, size) for seed, size in enumerate(sizes)]
    return processor(text=text, images=images, videos=[video(0), video(1)], padding=True, return_tensors="pt")


def pooled(patches: Tensor, mode: str = "average") -> Tensor:
    """Windows of 2 x 2 of the patches (N, D), one by one."""
    field = patches.view(SIDE, SIDE, -1)
    windows = [field[y : y + 2, x : x + 2].flatten(0, 1) for y in range(0, SIDE - 1, 2) for x in range(0, SIDE - 1, 2)]
    return torch.stack([window.amax(0) if mode == "max" else window.mean(0) for window in windows])


def plain_features(
    model: Any, inputs: Any, sizes: list[tuple[int, int]], mode: str = "average"
) -> dict[str, list[Run]]:
    """What takes the place of each run of placeholders: encoder with eager attention, explicit selection, projector."""
    tower, project = model.model.vision_tower, model.model.multi_modal_projector
    images, videos = [], []
    full = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    for run, tiles, size in zip(full, inputs["pixel_values"], sizes, strict=True):
        zipped = plain_zip(*plain_encode(tower, tiles[: TILES[size]]), K, M)
        images.append((len(run), project(plain_tiles(zipped, GRIDS[size], SIDE, M))))
    for frames in inputs["pixel_values_videos"]:
        tokens = []
        for hidden, score, key in zip(*plain_encode(tower, frames), strict=True):
            patches = model.model.vision_resampler(hidden[None, 1:])[0] if mode == "conv" else pooled(hidden[1:], mode)
            states, keys = torch.cat([hidden[:1], patches]), torch.cat([key[:1], pooled(key[1:])])
            zipped = plain_zip(states[None], pooled(score[:, None]).T, keys[None], K, M)
            tokens.append(project(zipped[0][0]))
        videos.append((FRAME * len(frames), torch.cat(tokens)))
    return {"images": images, "videos": videos}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["average", "max", "conv"])
def test_images_and_videos_of_a_batch_equal_the_plain_method(mixed: Any, sizes: list[tuple[int, int]], mode: str):
    model = build("next_video", edge=EDGE, spatial_pool_mode=mode)
    features = plain_features(model, mixed, sizes, mode)
    rows = plain_rows(model, mixed, **features)
    output = visionzip(model, K, M)(**mixed)
    expected = torch.cat([run for _, run in features["images"]])
    torch.testing.assert_close(output.image_hidden_states, expected, atol=1e-4, rtol=1e-5)
    expected = torch.cat([run for _, run in features["videos"]])
    torch.testing.assert_close(output.video_hidden_states.view_as(expected), expected, atol=1e-4, rtol=1e-5)
    assert output.logits.shape[1] == max(len(row) for row in rows) == output.past_key_values.get_seq_length()
    for logits, row in zip(output.logits, rows, strict=True):  # padded on the left
        torch.testing.assert_close(logits[-len(row) :], plain_logits(model, row), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", GRIDS)
def test_counts_per_tile_and_per_frame(model: Any, processor: Any, size: tuple[int, int]):
    inputs = processor(text="<video>, <image>", videos=[video(0, 4)], images=picture(0, size), return_tensors="pt")
    output = visionzip(model, K, M)(**inputs)
    expected = len(START + ", ") + 4 * (K + M) + TILES[size] * (K + M)
    assert output.logits.shape[1] == output.past_key_values.get_seq_length() == expected


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
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_equal_the_plain_method(model: Any, mixed: Any, sizes: list[tuple[int, int]], beams: int):
    rows = plain_rows(model, mixed, **plain_features(model, mixed, sizes))
    check_answers(visionzip(model, K, M), mixed, rows, beams)


@torch.no_grad()
def test_a_budget_of_all_tokens_compresses_nothing(model: Any, processor: Any):
    """A pooled frame has 9 patches, and CLS, which the model alone drops."""
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    full = model(**inputs).video_hidden_states.view(3, FRAME, -1)
    with pytest.warns(UserWarning, match="pools a frame to 10: no video"):
        visionzip(model, FRAME, 1)
    zipped = model(**inputs).video_hidden_states.view(3, FRAME + 1, -1)
    torch.testing.assert_close(zipped[:, 1:], full, atol=1e-5, rtol=1e-5)


def test_the_loss_counts_the_labelled_text(model: Any):
    processor = processor_for("next_video", edge=EDGE, padding_side="right")
    text = ["<image> is noise", "<video> moves"]
    inputs = processor(text=text, images=picture(0), videos=[video(0)], padding=True, return_tensors="pt")
    labels = text_labels(inputs)
    expected = plain_loss(model, inputs, labels, **plain_features(model, inputs, [(90, 60)]))
    loss = visionzip(model, K, M)(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_inputs_of_another_model_are_refused(model: Any, processor: Any):
    visionzip(model, K, M)
    inputs = processor(text="<video>", videos=[video(0)], return_tensors="pt")
    fewer = without_the_last_token(inputs)
    with pytest.raises(ValueError, match="video"):
        model(**fewer)
    with pytest.raises(ValueError, match="video"):
        model.generate(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :2]}, max_new_tokens=2)
    smaller = processor_for("next_video", edge=56)(text="<video>", videos=[video(0)], return_tensors="pt")
    with pytest.raises(ValueError, match="84"):
        model(**smaller)
    without_cls = processor_for("next_video", edge=EDGE, num_additional_image_tokens=0)
    with pytest.raises(ValueError, match="image"):
        model(**without_cls(text="<image>", images=picture(0), return_tensors="pt"))

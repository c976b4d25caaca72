"""VisionZip on Gemma 4: lists of patches with places, filled up to one length, whose squares its pooler averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_plain import plain_select
from seam_models import FAMILIES, Part, Picture, batch
from test_seam_families import answers
from torch import Tensor

from visionzip import visionzip
from visionzip.integrations import family_of
from visionzip.methods.visionzip import split

FAMILY = FAMILIES["gemma4"]
PICTURES = [Picture(1, 3, 4), Picture(2, 4, 2)]
VIDEO = Picture(4, 2, 3, frames=2)


def eager_scores(model: Any, pixels: Tensor, places: Tensor, frame: int) -> tuple[Tensor, Tensor]:
    """Of one picture, (n,) attention received and (n, Dk) keys of its tokens, from the eager matrix of all patches."""
    seen: list[Tensor] = []
    handle = model.model.vision_tower.encoder.layers[-1].self_attn.k_norm.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    matrix = model.model.vision_tower(pixels, places, output_attentions=True).attentions[-1][frame]
    handle.remove()
    real = places[frame, :, 0] >= 0
    scores = matrix[:, real][:, :, real].mean(dim=1).sum(dim=0)
    keys = seen[0][frame, real].mean(dim=1)
    rows, columns = (int(places[frame, :, axis].max() + 1) // 2 for axis in (1, 0))
    cells = [
        [(2 * y + j) * 2 * columns + 2 * x + i for j in range(2) for i in range(2)]
        for y in range(rows)
        for x in range(columns)
    ]
    return tuple(torch.stack([values[cell].mean(dim=0) for cell in cells]) for values in (scores, keys))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_kept_tokens_equal_the_plain_method(kind: str):
    """Of pictures of unequal shape, and of the frames of a video, each alone."""
    model = FAMILY.build("eager")
    inputs = batch(FAMILY, [list(PICTURES) if kind == "image" else [VIDEO]])
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    places = inputs[f"{kind}_position_ids"]
    whole = model.model.get_image_features(pixels, places, return_dict=True).pooler_output
    scored = [eager_scores(model, pixels, places, frame) for frame in range(2)]
    visionzip(model, keep=0.6)
    encoded = family_of(model).modalities[kind].encode(model.model, model._visionzip.config, inputs)
    for frame, (scores, keys) in enumerate(scored):
        kept, groups = plain_select(scores, keys, *split(round(0.6 * len(scores))))
        found = {place: whole[frame][place] for place in kept}
        for target, *members in groups:
            found[target] = whole[frame][target] + (whole[frame][members].mean(0) if members else 0)
        assert encoded.places[frame].tolist() == sorted(found)
        expected = torch.stack([found[place] for place in sorted(found)])
        torch.testing.assert_close(encoded.tokens[frame], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_patches_in_another_order_are_the_same_picture():
    """The places say where they are, here and in the stock model."""
    model = visionzip(FAMILY.build(), keep=0.5)
    inputs = batch(FAMILY, [["a", PICTURES[0], "b"]])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    shuffled = {**inputs, "pixel_values": inputs["pixel_values"][:, order]}
    shuffled["image_position_ids"] = inputs["image_position_ids"][:, order]
    torch.testing.assert_close(model(**shuffled).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_original_positions_and_a_size_bias():
    """Cached decoding is recomputation, with videos too."""
    rows: list[list[Part]] = [["a", PICTURES[0], "b", VIDEO, "c"], [PICTURES[1], "d"]]
    inputs = batch(FAMILY, rows)
    for setting in (
        {"positions": "original"},
        {"positions": "original", "size_bias": True},
        {"method": "visionzip-plus"},
    ):
        model = visionzip(FAMILY.build(), keep=0.4, **setting)
        assert torch.equal(answers(model, inputs), answers(model, inputs, use_cache=False))


def test_what_does_not_fit():
    model = visionzip(FAMILY.build(), keep=0.5)
    inputs = batch(FAMILY, [["a", PICTURES[0], VIDEO, "b"]])
    holes = inputs["image_position_ids"].clone()
    holes[:, 5] = -1
    for wrong, message in (
        ({"image_position_ids": None}, r"pixel_values must be \(N, patches, 48\) .* got \(1, 48, 48\) and None"),
        (
            {"image_position_ids": holes},
            r"are of \[47\] patches, which are no pictures of \[\(3, 4\)\] tokens of 2 x 2",
        ),
        (
            {"num_frames_per_video": torch.tensor([3])},
            r"num_frames_per_video is \[3\] for 2 frames of \[\(2, 3\)\] tokens",
        ),
    ):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**{**inputs, **wrong})
    config = FAMILY.config()
    config.vision_config = None
    with pytest.raises(TypeError, match="this Gemma 4 has no image encoder"):
        visionzip(type(model)(config))

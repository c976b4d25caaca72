"""Settings of VisionZip behind transformers' seam, and the stock processor."""

from __future__ import annotations

import pytest
import torch
from hf_models import tokenizer
from seam_models import FAMILIES, Picture, batch
from test_seam_families import GREEDY
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from checkpoints import picture
from visionzip import visionzip


def test_a_layer_of_windows_is_refused():
    model = FAMILIES["qwen2_5_vl"].build()
    with pytest.raises(ValueError, match=r"layer=-2 of this Qwen2_5_VL.* does not compare all .* use one of -3, -1"):
        visionzip(model, layer=-2)
    assert visionzip(model, layer=-3).config.visionzip["layer"] == -3
    with pytest.raises(ValueError, match="positions='consecutive' does not fit Qwen2_5_VL"):
        visionzip(model, positions="consecutive")


@torch.no_grad()
def test_numbers_of_tokens_are_a_cap():
    """Small pictures keep all that they have."""
    family = FAMILIES["qwen2_5_vl"]
    inputs = batch(family, [[Picture(1, 4, 4), Picture(2, 1, 2)]])
    model = visionzip(family.build(), dominant=4, contextual=1)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert [len(own) for own in features] == [5, 2]
    assert model.config.visionzip == {"dominant": 4, "contextual": 1, "layer": -1, "merge": "released"}


class _ImagesAlone(Qwen2_5_VLProcessor):
    """The stock processor without the part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


@torch.no_grad()
def test_the_stock_processor():
    family = FAMILIES["qwen2_5_vl"]
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096)
    processor, model = _ImagesAlone(images, tokenizer()), family.build()
    model.config.image_token_id = image_id = processor.image_token_id
    model.resize_token_embeddings(300)
    inputs = processor(
        images=[picture(0, (48, 32)), picture(1, (32, 32))],
        text=["a<image>b", "<image> longer"],
        padding=True,
        return_tensors="pt",
    )
    full = int((inputs["input_ids"] == image_id).sum())
    assert full == 6 * 4 + 4 * 4
    output = visionzip(model)(**inputs)
    assert output.logits.shape[1] < inputs["input_ids"].shape[1]
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5


@torch.no_grad()
def test_videos_that_look_like_images_are_refused():
    """Of GLM-4V, in the first turn and behind a cache."""
    family = FAMILIES["glm4v"]
    model = visionzip(family.build(), keep=0.4)
    inputs = batch(family, [["a", Picture(1), "b"]])
    cache = model(**inputs).past_key_values
    video = {"input_ids": inputs["input_ids"], "pixel_values_videos": inputs["pixel_values"]}
    video["video_grid_thw"] = inputs["image_grid_thw"]
    for call in (model, model.generate):
        for past in ({}, {"past_key_values": cache}):
            with pytest.raises(ValueError, match="videos of this family are not compressed: give their frames as"):
                call(**video, **past)

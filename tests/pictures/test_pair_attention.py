"""``pair_attention``: what each patch attends to, as the encoder's own attention matrices say."""

from __future__ import annotations

import base64

import hf_models
import hf_video_models
import pytest
import torch

from llava.model.stock.transformers_llava import TransformersLlava
from llava.picture import picture_data
from visionzip import visionzip
from visionzip.drawing.pair_attention import packed_pairs, pair_attention

from checkpoints import picture, pixels  # isort: skip


@pytest.mark.parametrize(("family", "cls_token"), [("llava", 1), ("onevision", 0)])
@torch.no_grad()
def test_pairs_are_the_encoders_own(family: str, cls_token: int):
    """Row i is of patch i: with a CLS token that is row i + 1 of the matrix."""
    model = hf_video_models.STOCK[family][0]()
    edge = model.config.vision_config.image_size
    images = torch.rand(2, 3, edge, edge)
    visionzip(model, dominant=2, contextual=1)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    layer = model.config.visionzip["layer"]
    matrix = tower(images, output_attentions=True).attentions[layer].mean(dim=1)
    torch.testing.assert_close(pair_attention(model, images), matrix[:, cls_token:, cls_token:])


def test_packed_for_a_page():
    attention = torch.tensor([[0.4, 0.1, 0.025], [0.0, 0.2, 0.0], [0.1, 0.1, 0.1]])
    assert list(base64.b64decode(packed_pairs(attention))) == [255, 128, 64, 0, 255, 0, 255, 255, 255]


def test_in_the_data_of_a_picture():
    model = TransformersLlava(hf_models.llava())
    processor = hf_models.llava_processor().image_processor
    model.get_vision_tower().image_processor = processor
    (tile,) = picture_data(model, picture(0), processor, pairs=True)["tiles"]
    assert len(base64.b64decode(tile["pairs"])) == len(tile["rects"]) ** 2
    assert "pairs" not in picture_data(model, picture(0), processor)["tiles"][0]
    assert pair_attention(model, pixels(1)).sum(dim=-1).max() < 1  # the rest is what the CLS token gets

"""Encoders and projectors whose output is no number: refused once a call, wherever the model comes from."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from seam_models import FAMILIES, Picture, batch

from checkpoints import picture, pixels
from llava.constants import IMAGE_TOKEN_INDEX
from llava.serve.chat import ChatSession
from visionzip import visionzip

MESSAGE = r"\[0\] has \d+ visual tokens that are NaN or infinite, of \d+, .* torch\.float32 is too small"


def broken(module: Any) -> None:
    with torch.no_grad():
        next(module.parameters()).fill_(torch.nan)


@torch.no_grad()
@pytest.mark.parametrize("method", ["visionzip", "agile", "divprune"])
def test_transformers_models(method: str):
    seam, llava = FAMILIES["qwen3_vl"], hf_models.llava()
    for model, inputs in (
        (seam.build(), batch(seam, [["a", Picture(1), "b"]])),
        (llava, hf_models.llava_batch(texts=["a <image> b"])),
    ):
        visionzip(model, keep=0.5, method=method)
        broken(model.model.visual.merger if model is not llava else model.model.multi_modal_projector)
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=f"pixel_values{MESSAGE}"):
                call(**inputs)
        model.train()(**inputs)  # an overflow of mixed precision is its scaler's


@torch.no_grad()
def test_in_tree_models(load: Any):
    tokenizer, model, processor, _ = load()
    ids = torch.tensor([[1, 20, IMAGE_TOKEN_INDEX, 30]])
    for zipped in (model, visionzip(model, dominant=5, contextual=2)):
        broken(model.get_model().mm_projector)
        for call in (zipped, zipped.generate):
            with pytest.raises(ValueError, match=f"images{MESSAGE}"):
                call(ids, images=pixels(1))
    session = ChatSession(model, tokenizer, processor, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"images{MESSAGE}"):
        session.ask("What is it?", [picture(0)])

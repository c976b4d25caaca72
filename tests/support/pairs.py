"""One set of weights in two classes: LLaVA's own model, and transformers' after ``visionzip convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from checkpoints import picture
from layouts import convert
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from visionzip import visionzip


class Pair(NamedTuple):
    """Both models, and the images' processor of the first."""

    own: Any
    native: Any
    image_processor: Any

    def zipped(self, **setting: int) -> Pair:
        visionzip(self.own, **setting)
        visionzip(self.native, **setting)
        return self


def load_pair(source: Path, folder: Path) -> Pair:
    assert convert(source, folder, "transformers") == 0
    _, own, image_processor, _ = load_pretrained_model(str(source), device="cpu")
    return Pair(own, AutoModelForImageTextToText.from_pretrained(folder).eval(), image_processor)


def native_pixels(native: Any, images: Any, sizes: Any) -> dict[str, Tensor]:
    """LLaVA's pixels as transformers' processor returns them: tiles filled up to the most, (height, width)."""
    if native.config.model_type == "llava":
        return {"pixel_values": torch.stack([image.reshape(image.shape[-3:]) for image in images])}
    return {
        "pixel_values": pad_sequence(list(images), batch_first=True),
        "image_sizes": torch.tensor([(height, width) for width, height in sizes]),
    }


def native_prompts(native: Any, input_ids: Tensor, mask: Tensor | None, runs: list[int]) -> dict[str, Tensor]:
    """LLaVA's prompts as transformers' processor writes them: as many placeholders as the model has visual tokens.

    Args:
        input_ids: (B, L) with LLaVA's sentinel.
        mask: (B, L) or None.
        runs: visual tokens of each image, without compression.
    """
    lengths, rows = iter(runs), []
    for row, keep in zip(input_ids, torch.ones_like(input_ids) if mask is None else mask, strict=True):
        ids: list[int] = []
        for token in row[keep.bool()].tolist():
            ids += [native.config.image_token_id] * next(lengths) if token == IMAGE_TOKEN_INDEX else [token]
        rows.append(torch.tensor(ids))
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return {"input_ids": pad_sequence(rows, batch_first=True, padding_side="left"), "attention_mask": mask}


def pictures(pair: Pair, *sizes: tuple[int, int]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    images = [picture(seed, size) for seed, size in enumerate(sizes)]
    return [process_images([image], pair.image_processor, pair.own.config)[0] for image in images], list(sizes)

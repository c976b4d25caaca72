"""What images go through in a model, for what looks into it (:mod:`visionzip.token_map`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from visionzip.config import VisionZipConfig


@dataclass(frozen=True)
class Encoder:
    """An image encoder of a model, with the compression behind it.

    Attributes:
        vision_model: transformers' CLIP or SigLIP encoder, as :mod:`visionzip.encoder` runs it.
        setting: how its tokens are compressed; None if the model is not zipped.
        project: the model's projector, (B, N, D) to (B, N, P); None of a vision tower alone.
        trained: encoder layers, from the first one on, that have trained weights.
        processor: gives the model's image processor; None where the model does not have it.
        inputs: what the encoder and each of its layers are given for a batch of the model's pixels: (B, 3, h, w), and
            arguments by name. Raises ValueError where the shape is wrong.
    """

    vision_model: nn.Module
    setting: VisionZipConfig | None
    project: Callable[[Tensor], Tensor] | None
    trained: int
    processor: Callable[[], Any] | None = None
    inputs: Callable[[Tensor], tuple[Tensor, dict[str, Any]]] = field(default=lambda pixels: (pixels, {}))

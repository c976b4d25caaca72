"""Describe the image encoder of a model to what looks into it, such as :mod:`visionzip.token_map`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig


@dataclass(frozen=True)
class Pooling:
    """How a family pools the N patches of a frame to n before tokens are chosen among these.

    Attributes:
        patches: ``(base)`` to n.
        pool: ``(base, values)``, which pools values of patches (F, N, C), such as scores, to (F, n, C).
        choose: ``(base, frames, config)``, which chooses the tokens of frames (F, 3, h, w); it returns the projected
            tokens, and the same tokens before the projector with where they come from.
    """

    patches: Callable[[nn.Module], int]
    pool: Callable[[nn.Module, Tensor], Tensor]
    choose: Callable[[nn.Module, Tensor, VisionZipConfig], tuple[Tensor, CompressedTokens]]


@dataclass(frozen=True)
class Encoder:
    """An image encoder of a model, and how its tokens are compressed.

    Attributes:
        vision_model: the CLIP or SigLIP encoder of transformers, which :mod:`visionzip.encoder` can run.
        setting: how its tokens are compressed; None if the model is not zipped.
        project: the model's projector, (B, N, D) to (B, N, P); None for a vision tower alone.
        trained: how many encoder layers, from the first one on, have trained weights.
        processor: returns the model's image processor; None if the model does not have it.
        inputs: converts a batch of the model's pixels to the encoder's input (B, 3, h, w) and the arguments by name
            that each layer gets. It raises ValueError if the shape is wrong.
        pooling: how patches are pooled before tokens are chosen, with the base model; None if they are not.
    """

    vision_model: nn.Module
    setting: VisionZipConfig | None
    project: Callable[[Tensor], Tensor] | None
    trained: int
    processor: Callable[[], Any] | None = None
    inputs: Callable[[Tensor], tuple[Tensor, dict[str, Any]]] = field(default=lambda pixels: (pixels, {}))
    pooling: tuple[nn.Module, Pooling] | None = None

"""Images, videos and prompts of the tiny Video-LLaVA that ``conftest.py`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model

EDGE = 112  # 8 x 8 patches


def load(folder: Path) -> Any:
    return load_pretrained_model(str(folder), device="cpu")[1]


def image(seed: int = 0) -> Tensor:
    return torch.randn(3, EDGE, EDGE, generator=torch.Generator().manual_seed(seed))


def video(seed: int = 0, frames: int = 8, edge: int = EDGE) -> Tensor:
    return torch.randn(3, frames, edge, edge, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int) -> Tensor:
    """A prompt; a number below 0 stands for so many ``<image>``."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE_TOKEN_INDEX] * -part if part < 0 else [part]
    return torch.tensor([ids])

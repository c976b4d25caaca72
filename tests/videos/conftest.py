"""A tiny Video-LLaVA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_videos import EDGE, load

from checkpoints import CLIP


@pytest.fixture
def folder(make_video_checkpoint: Callable[..., Path]) -> Path:
    return make_video_checkpoint(vision={**CLIP, "image_size": EDGE})


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder)

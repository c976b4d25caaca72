"""A short run of the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run(make_checkpoint: Callable[..., Path], scenes_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short run on the tiny model (4 x 4 patches), into ``out``."""

    def arguments(*more: str, model: Path | None = None, limit: int = 24) -> list[str]:
        model = model or make_checkpoint()
        places = ["--model-path", str(model), "--data", str(scenes_data), "--output", str(tmp_path / "out")]
        return ["run", "scenes", *places, "--device", "cpu", "--batch-size", "8", "--limit", str(limit), *more]

    return arguments

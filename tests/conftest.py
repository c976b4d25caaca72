"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_checkpoint
from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a random checkpoint in the original layout; the same arguments give the same folder."""
    folders: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        key = repr(sorted(overrides.items(), key=str))
        if key not in folders:
            folders[key] = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llava-v1.5-tiny", **overrides)
        return folders[key]

    return make


@pytest.fixture
def load(make_checkpoint):
    """``load_pretrained_model`` of such a checkpoint on the CPU: tokenizer, model, image processor, context length."""

    def make(**overrides: Any) -> tuple[Any, Any, Any, int]:
        return load_pretrained_model(str(make_checkpoint(**overrides)), device="cpu")

    return make

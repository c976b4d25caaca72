"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel

from checkpoints import edit_config, write_checkpoint
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import LlavaMetaForCausalLM

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="visionzip-tests-")  # not among the user's data sets


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


@pytest.fixture
def copied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint for this test alone, which may change it and the folder ``tower`` beside it."""

    def make(**options: Any) -> Path:
        source = make_checkpoint(**options)
        folder = shutil.copytree(source, tmp_path / "llava")
        shutil.copytree(source.with_name(source.name + "-tower"), tmp_path / "tower")
        edit_config(folder, mm_vision_tower=str(tmp_path / "tower"))
        return folder

    return make


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    """What users would read, from transformers too."""
    transformers.logging.enable_propagation()
    yield caplog
    transformers.logging.disable_propagation()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a LLaVA's weights are read: what can be known before has to be said before."""
    read = PreTrainedModel._load_pretrained_model

    def guarded(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(model, LlavaMetaForCausalLM), "too late: the weights are being read"
        return read(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(guarded))

"""Checkpoints in transformers' layout, beside the same in LLaVA's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.registry import BENCHMARKS
from layouts import convert
from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="session")
def converted(make_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of ``make_checkpoint`` in transformers' layout, with its processor; saved by transformers."""
    folders: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        source = make_checkpoint(**options)
        if str(source) not in folders:
            folders[str(source)] = tmp_path_factory.mktemp("converted") / "llava-1.5-tiny-hf"
            assert convert(source, folders[str(source)], "transformers") == 0
        return folders[str(source)]

    return make


@pytest.fixture
def both(load, converted) -> Callable[..., list[tuple[Any, Any, Any]]]:
    """Tokenizer, model and image processor of the same weights in LLaVA's layout and in transformers'."""

    def make(**options: Any) -> list[tuple[Any, Any, Any]]:
        return [load(**options)[:3], load_pretrained_model(str(converted(**options)), device="cpu")[:3]]

    return make


@pytest.fixture
def brief_msvd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to MSVD-QA end after four tokens: a random model would not end before the benchmark's limit."""
    monkeypatch.setitem(BENCHMARKS, "msvd", replace(BENCHMARKS["msvd"], max_new_tokens=4))

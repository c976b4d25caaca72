"""Fixtures of a benchmark's tests: its tiny data set, both ways, for one test alone."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from eval.reading.tables import Tables


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """LLaVA's folder of the ``BENCHMARK`` that the test's file imports; its file in ``data/`` writes it."""
    benchmark = request.module.BENCHMARK
    importlib.import_module(f"data_{benchmark.name}").write_folder(tmp_path)
    return tmp_path / benchmark.folder


@pytest.fixture
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Tables:
    """The hub's tables of that benchmark, which lie in ``hub``."""
    benchmark = request.module.BENCHMARK
    importlib.import_module(f"data_{benchmark.name}").write_tables(tmp_path / "hub")
    return Tables(benchmark.tables, tmp_path / "hub")

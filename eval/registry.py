"""The benchmarks by name: every file in eval/benchmarks/ with a ``BENCHMARK`` (or ``BENCHMARKS``, several)."""

from __future__ import annotations

import importlib
import pkgutil

from . import benchmarks
from .benchmark import Benchmark


def _found() -> dict[str, Benchmark]:
    modules = [
        importlib.import_module(f"{benchmarks.__name__}.{info.name}")
        for info in pkgutil.iter_modules(benchmarks.__path__)
    ]
    each = [one for module in modules for one in getattr(module, "BENCHMARKS", [getattr(module, "BENCHMARK", None)])]
    return {benchmark.name: benchmark for benchmark in each if benchmark is not None}


BENCHMARKS: dict[str, Benchmark] = _found()

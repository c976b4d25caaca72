"""The benchmarks by name. A new one is a file with a ``BENCHMARK``, and its line here."""

from __future__ import annotations

from eval import scenes
from eval.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (scenes.BENCHMARK,)}

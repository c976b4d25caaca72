"""Scores of answered runs, as far as they can be had here, and files for the servers that score the others."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark
from ..records import Answer, Score, UnscoredError
from ..scoring.judge import Judge
from ..scoring.matching import asked
from .methods import Run


def unscored(benchmark: Benchmark, judge: Judge | None) -> str | None:
    """Why answers are written, but not scored; None where they are."""
    if benchmark.score is None:
        return "its server scores"
    if not benchmark.judged or judge is not None:
        return None
    return f"give --judge MODEL{', or --judge exact for a proxy,' if benchmark.proxy else ''} to score it"


def submit_all(benchmark: Benchmark, answers: Mapping[Run, Sequence[Answer]], truth: Any, folder: Path) -> None:
    """Write what a server wants of some runs, each into a folder of its own."""
    for run, own in answers.items():
        print(f"for the server: {benchmark.submit(own, truth, folder / run.name)}", file=sys.stderr)


def score_all(
    benchmark: Benchmark, answers: Mapping[Run, Sequence[Answer]], truth: Any, judge: Judge | None, limited: bool
) -> dict[Run, Score]:
    """Scores of some runs, as far as they can be had here; of limited ones, over what was asked."""
    part_of = benchmark.asked or asked
    scores = {}
    for run, own in answers.items():
        if why := unscored(benchmark, judge):
            print(f"{run.name}: answers are written, not scored: {why}", file=sys.stderr)
            continue
        try:
            scores[run] = benchmark.score(own, part_of(own, truth) if limited else truth, judge)
        except UnscoredError as error:
            print(f"{run.name}: answers are written, not scored: {error}", file=sys.stderr)
    return scores

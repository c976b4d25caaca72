"""What a benchmark is: where its data lies, how it asks, how answers are scored. Each is a file in eval/benchmarks/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reading.tables import Tables
from .records import Answer, File, Question, Score, Table
from .scoring.judge import Judge


@dataclass(frozen=True)
class Benchmark:
    """Data, prompt, metric and submission, and nothing else.

    The data comes from LLaVA's folder or from the hub (or a local copy of its parquet files). Either way gives the same
    kind of questions, and the same kind of truth, whatever ``score`` wants to have.

    Attributes:
        name: how commands call it.
        title: how tables call it.
        summary: one line about it: metric and size.
        folder: LLaVA's folder, below the data root (``playground/data/eval``).
        files: what that folder holds.
        tables: on the hub, by the names that ``from_tables`` uses.
        from_folder: the questions, in the order of the official answers file.
        from_tables: the questions.
        truth_from_folder: what ``score`` compares with; images need not be there.
        truth_from_tables: the same.
        score: of answers in any order; answers that are missing, or to no question, are counted as the official tool
            does, and reported in the details. The judge is None unless ``judged``.
        max_new_tokens: limit on an answer's length, LLaVA's.
        conv_mode: the protocol's template for models of Vicuna; others have their own.
        judged: a language model scores: ``score`` needs its judge.
        proxy: a comparison of strings can stand in for it (``--judge exact``).
        graded: the score of a file that the official judge has graded already.
        submit: for a server: write the answers in its format into a folder; returns the file.
        missing: what the official tool does with questions that have no answer, in words.
        asked: the part of a truth that some answers are to, where :func:`eval.scoring.matching.asked` does not find it.
    """

    name: str
    title: str
    summary: str
    folder: str
    max_new_tokens: int
    from_folder: Callable[[Path], list[Question]]
    truth_from_folder: Callable[[Path], Any]
    score: Callable[[Sequence[Answer], Any, Judge | None], Score] | None
    files: tuple[File, ...] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    from_tables: Callable[[Tables], list[Question]] | None = None
    truth_from_tables: Callable[[Tables], Any] | None = None
    conv_mode: str = "vicuna_v1"
    judged: bool = False
    proxy: bool = True
    graded: Callable[[Path, Path | None], Score] | None = None
    submit: Callable[[Sequence[Answer], Any, Path], Path] | None = None
    missing: str = "do not count"
    asked: Callable[[Sequence[Answer], Any], Any] | None = None

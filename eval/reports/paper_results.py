"""Our results for the cells of the paper's tables: which result files count, and which score belongs in which cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.video import FRAMES

from .. import COMMAND
from ..reading.sources import need, read_json
from .paper_tables import Column, PaperTable, Row


@dataclass(frozen=True)
class Result:
    """A row of one of our result files.

    Attributes:
        benchmark: name.
        model: last part of its name, in lower case.
        method: name.
        tokens: of each image, tile or frame; None are all.
        tuned: the projector is tuned.
        score: the headline.
        variants: further scores by name.
        file: where it is from.
    """

    benchmark: str
    model: str
    method: str
    tokens: int | None
    tuned: bool
    score: float
    variants: Mapping[str, Any]
    file: Path


def load_results(folder: Path) -> tuple[list[Result], list[str]]:
    """Our results below a folder: of every json file with benchmark, model and rows.

    Returns:
        the results; and remarks on them: which the judge has not judged whole, and what is left out, with the reason
        (runs over a part of a benchmark, with another number of frames, with the proxy judge, or with another share of
        dominant tokens than the paper's).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a result file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give one with results of `{COMMAND} run`")
    results, remarks = [], []
    for path in sorted(folder.rglob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or not {"benchmark", "model", "rows"} <= set(content):
            continue
        if reason := _why_not(content):
            remarks.append(f"Left out: {path.relative_to(folder)} ({reason}).")
            continue
        model = str(content["model"]).rstrip("/").rpartition("/")[2].lower()
        for row in content["rows"]:
            method = need(row, "method", f"a row of {path}")
            if not _has_papers_split(row):
                split = f"{row['dominant']}+{row['contextual']}"
                remarks.append(f"Left out: {path.relative_to(folder)}, {method} {split} (not the paper's split).")
            elif row.get("score") is not None:  # otherwise only a server can tell
                if row.get("unjudged"):
                    row_name = " ".join(map(str, filter(None, (method, row.get("tokens")))))
                    remarks.append(f"{path.relative_to(folder)}, {row_name}: {row['metric']}.")
                results.append(
                    Result(
                        benchmark=content["benchmark"],
                        model=model,
                        method=method,
                        tokens=row.get("tokens"),
                        tuned=bool(content.get("tuned", False)),
                        score=float(row["score"]),
                        variants={**row.get("details", {}), **row.get("parts", {})},
                        file=path,
                    )
                )
    return results, remarks


def _why_not(content: Mapping[str, Any]) -> str | None:
    if content.get("limited"):
        return "only a part of the questions"
    if (frames := content.get("setting", {}).get("frames")) not in (None, FRAMES):
        return f"{frames} frames of each video, not {FRAMES}"
    return "judged by the offline proxy" if content.get("judge") == "exact" else None


def _has_papers_split(row: Mapping[str, Any]) -> bool:
    """VisionZip's dominant to contextual tokens are 27 to 5, where the paper tells (not for Video-LLaVA's 17)."""
    if row["method"] != "visionzip" or row.get("dominant") is None or not row.get("tokens") or row["tokens"] % 32:
        return True
    return 5 * row["dominant"] == 27 * row["contextual"]


def find(results: Iterable[Result], table: PaperTable, row: Row, column: Column) -> float | None:
    """Our score in a cell, None if there is none.

    Raises:
        ValueError: two runs give different ones.
    """
    if column.benchmark is None or not row.ours:
        return None
    tokens, rest = (None, 0) if row.method == "vanilla" else divmod(row.tokens, table.tiles)
    if rest:  # 135 tokens for eight frames
        return None
    key = (column.benchmark, row.model or table.model, row.method, tokens, row.tuned)
    found: dict[float, Path] = {}
    for result in results:
        if key == (result.benchmark, result.model, result.method, result.tokens, result.tuned):
            score = _variant(result, column.variant)
            if score is not None:
                found.setdefault(score, result.file)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"two results for {column.name}, {row.label} at {row.tokens} tokens: {one:g} in {first} and {other:g} in "
            f"{second}; move one of them out of the folder"
        )
    return next(iter(found), None)


def _variant(result: Result, name: str | None) -> float | None:
    if name is None:
        return result.score
    if name == "all" and "video" not in result.variants:  # the hub's SEED-Bench is asked about images alone
        return None
    score = result.variants.get(name)
    return score if isinstance(score, int | float) else None

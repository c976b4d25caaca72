"""The tables of ``visionzip benchmark gpu``, as Markdown between two markers of a document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.measure.report import Columns, Row, quartiles
from llava.storage.files import write_atomically

BEGIN, END = "<!-- gpu report: written by scripts/gpu_report.sh -->", "<!-- gpu report: end -->"


def _ms(*keys: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = _at(row, keys)
        return "" if found is None else f"{1e3 * found['median']:.2f}"

    return cell


def _times(*keys: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = _at(row, keys)
        return "" if found is None else "{:.2f} ({:.2f}-{:.2f})".format(found["median"], *found["quartiles"])

    return cell


def _at(row: Row, keys: Sequence[str]) -> Any:
    found: Any = row
    for key in keys:
        found = None if found is None else found.get(key)
    return found


def _percent(found: Any) -> str:
    return "" if found is None else f"{found['median']:.1%}"


_ANSWERS: Columns = (
    ("model", lambda row: row["model"]),
    ("image", lambda row: row["image"]),
    ("batch", lambda row: str(row["batch"])),
    ("way", lambda row: row["way"]),
    ("visual tokens", lambda row: str(row["visual_tokens"])),
    ("tower, ms", _ms("seconds", "tower")),
    ("prefill, ms", _ms("seconds", "prefill")),
    ("x", _times("speed_up", "prefill")),
    ("of the bare language model's gain", lambda row: _percent(row.get("of_bare"))),
    ("first token from pixels, ms", _ms("seconds", "first_token")),
    ("x", _times("speed_up", "first_token")),
    ("tokens/s", lambda row: f"{row['tokens_per_second']['median']:.1f}"),
    ("x", _times("speed_up", "decode")),
    ("peak memory, GiB", lambda row: f"{row['memory_mib'] / 1024:.2f}"),
    ("KV cache, MiB", lambda row: f"{row['kv_cache_mib']:.1f}"),
)
_CHOOSING: Columns = (
    ("method", lambda row: row["method"]),
    ("batch", lambda row: str(row["batch"])),
    ("tokens", lambda row: str(row["tokens"])),
    ("read, ms", _ms("seconds", "read")),
    ("choice, ms", _ms("seconds", "choice")),
    ("of the tower", lambda row: _percent(row["share"])),
    ("projection of all patches, ms", _ms("seconds", "projection")),
)
_GREEDY: Columns = (
    ("method", lambda row: row["method"]),
    ("kept", lambda row: f"{row['tokens']} of {row['patches']}"),
    ("as it is, ms", _ms("seconds", "eager")),
    ("CUDA graph, ms", _ms("seconds", "graph")),
    ("compiled, ms", _ms("seconds", "compiled")),
    ("x", _times("speed_up")),
    ("made in, s", lambda row: "" if row["prepared"] is None else f"{row['prepared']:.1f}"),
    ("same choice", lambda row: {True: "yes", False: "NO", None: ""}[row["same_choice"]]),
)
_TUNING: Columns = (
    ("model", lambda row: row["model"]),
    ("batch", lambda row: str(row["batch"])),
    ("way", lambda row: row["way"]),
    ("visual tokens", lambda row: str(row["visual_tokens"])),
    ("a step, ms", lambda row: f"{1e3 * row['seconds']:.1f}"),
    ("ratio", lambda row: f"{row['time_ratio']:.3f} ({quartiles(row['time_spread'])})"),
    ("peak memory, GiB", lambda row: f"{row['memory_mib'] / 1024:.2f}"),
)
_KERNELS: Columns = (
    ("encoder", lambda row: row["encoder"]),
    ("kernel", lambda row: row["kernel"]),
    ("type", lambda row: row["dtype"]),
    ("patches", lambda row: str(row["patches"])),
    ("largest difference, of the mean score", lambda row: f"{row['difference']:.2e}"),
    ("same best quarter", lambda row: f"{row['same_quarter']:.2%}"),
)
_TESTS: Columns = (
    ("tests", lambda row: row["way"]),
    ("pytest says", lambda row: "; ".join([row["said"], *row["skipped"]])),
)
TABLES: dict[str, tuple[str, Columns]] = {
    "answers": ("Whole answers; times (x) are to vanilla in the same round, with quartiles.", _ANSWERS),
    "choosing": ("What choosing adds behind the vision tower of the LLaVAs.", _CHOOSING),
    "greedy": ("Greedy choosers, and what a CUDA graph or `torch.compile` makes of them.", _GREEDY),
    "tuning": ("A step of projector tuning; the tower is in memory in all ways.", _TUNING),
    "kernels": ("Scores of patches by each attention kernel, beside eager attention.", _KERNELS),
    "tests": ("Tests that are skipped without a GPU.", _TESTS),
}


def check_document(path: Path) -> None:
    """Check that there is a document with both markers.

    Raises:
        ValueError: it lacks one.
        OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must have the lines {BEGIN!r} and {END!r} once each, between which the tables go")


def update_document(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report between the markers of a document, in the place of what is there."""
    text = path.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    write_atomically(path, f"{before}{BEGIN}\n\n{markdown(report)}\n\n{after}")


def markdown(report: Mapping[str, Any]) -> str:
    """Make the tables of a report, and the lists of what is not in them.

    Args:
        report: as :mod:`llava.measure.gpu.report` writes it.
    """
    names = ("date", "device", "python", "torch", "cuda", "transformers", "flash_attn", "dtype")
    parts = [", ".join(f"{name} {report[name]}" for name in names) + ". Random weights."]
    if report["scaled"]:
        parts.append("**A scaled run: tiny shapes, to try the command. Its figures say nothing about the models.**")
    for kind, (title, columns) in TABLES.items():
        if rows := [row for own in report["sections"].values() if own["kind"] == kind for row in own["rows"]]:
            parts += [title, _table(columns, rows)]
    if missing := [line for name, own in report["sections"].items() if (line := _missing(name, own))]:
        parts += ["Not measured, or not all of it:", "\n".join(missing)]
    return "\n\n".join(parts)


def _table(columns: Columns, rows: Sequence[Row]) -> str:
    used = [(name, [cell(row).replace("|", "\\|") for row in rows]) for name, cell in columns]
    used = [(name, cells) for name, cells in used if any(cells)]
    lines = [[name for name, _ in used], ["---"] * len(used), *zip(*(cells for _, cells in used), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _missing(name: str, section: Mapping[str, Any]) -> str:
    if section["state"] == "done":
        return ""
    reason = (section["why"] or "").strip().splitlines()[-1:] or [""]
    return f"- {name} ({section['about']}): {section['state']}. {reason[0]}".rstrip()

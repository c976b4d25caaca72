"""Results as a table: markdown for files, rich for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.commands.screen import print_table, say
from llava.storage.files import write_atomically

from .. import COMMAND
from ..scoring.matching import shortfalls

_MISSING = "-"
_UNJUDGED = " †"  # the judge has not judged all answers: the metric's name says more


def write_table(folder: Path) -> None:
    """Write ``table.md`` from a run's ``results.json``, and print it.

    Args:
        folder: where ``results.json`` is.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: the file is damaged.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: run `{COMMAND} run … --output {folder}` to its end first")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): run `{COMMAND} run … --output {folder}` again") from error
    tables = [main_table(results), *([differences_table(results)] if results["differences"] else [])]
    title = f"{results['benchmark']}: {results['model']}"
    texts = [f"# {title}\n", markdown(tables[0]), *(_ABOVE_DIFFERENCES + markdown(table) for table in tables[1:])]
    write_atomically(folder / "table.md", "\n".join([*texts, facts(results), ""]))

    for table, name in zip(tables, (title, "visionzip minus others, in points"), strict=False):
        print_table(name, table[0], table[1:], left=table[0][:1])
    say(facts(results), "dim")


_ABOVE_DIFFERENCES = (
    "visionzip minus the others at the same budget, in points ± standard error (paired by question):\n\n"
)


def main_table(results: dict[str, Any]) -> list[list[str]]:
    """Header and rows: scores, those of the parts first, and what the tokens cost."""
    categories = list(results["rows"][0].get("parts", {}))
    overall = "overall (partial)" if results["limited"] else "overall"
    header = ["method", "visual tokens", *categories, overall, "% of vanilla", "prefill ms (speed-up)", "GFLOPs"]
    lines = [header]
    for row in results["rows"]:
        budget = "" if row["dominant"] is None else f" {row['dominant']}+{row['contextual']}"
        means = [row.get("parts", {}).get(category) for category in categories]
        score = _MISSING if "score" not in row else with_error(row["score"], row["standard_error"])
        score += "*" if shortfalls(row.get("details", {}), "") else ""
        of_vanilla = row.get("of_vanilla")
        speed_up = f" ({row['prefill_speed_up']['median']:.1f}x)" if "prefill_speed_up" in row else ""
        lines.append(
            [
                row["method"] + budget,
                f"{row['visual_tokens']:.4g}",
                *(_MISSING if mean is None else f"{mean:.1f}" for mean in means),
                score + (_UNJUDGED if row.get("unjudged") else ""),
                _MISSING if of_vanilla is None else f"{100 * of_vanilla:.1f}",
                f"{1e3 * row['prefill_seconds']['median']:.1f}{speed_up}",
                f"{row['flops'] / 1e9:.3g}",
            ]
        )
    return lines


def differences_table(results: dict[str, Any]) -> list[list[str]]:
    """Header and rows: for each budget, VisionZip's accuracy minus that of each other method."""
    found = {(entry["tokens"], entry["minus"]): entry for entry in results["differences"]}
    budgets = list(dict.fromkeys(tokens for tokens, _ in found))
    others = list(dict.fromkeys(minus for _, minus in found))
    lines = [["visual tokens", *others]]
    for tokens in budgets:
        entries = [found[tokens, minus] for minus in others]
        lines.append([str(tokens), *(with_error(e["difference"], e["standard_error"], "+") for e in entries)])
    return lines


def markdown(lines: list[list[str]]) -> str:
    """A GitHub table."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def facts(results: dict[str, Any]) -> str:
    """What the figures are and how they came about, in a few sentences."""
    where, images = results["environment"], results.get("images")
    rounds = len(next(iter(results["cost"]["prefill"].values()))["seconds"])
    seeds = max((len(row.get("score_by_seed", {})) for row in results["rows"]), default=0)
    number = f"{results['questions']} questions"
    if results["limited"]:
        number = f"Partial: {results['questions']} of {results.get('of_questions', 'all')} questions, scored over these"
    incomplete = results.get("incomplete", {}).items()
    inside = sorted({row["method"] for row in results["rows"] if len(set(row.get("visual_tokens_by_layer", ()))) > 1})
    count = results.get("setting", {}).get("frames")
    frames = "" if count is None else f", {count} frames of each video"
    metric = _metrics(results["rows"])
    return (
        f"{number}{frames}; {metric}; ± standard error by bootstrap over questions"
        f"{f'; random: mean of {seeds} seeds' if seeds else ''}. Prefill: the language model alone, one prompt of "
        f"{results['cost']['text_tokens']} text tokens and the visual ones, median of {rounds} interleaved rounds, "
        "speed-up over vanilla in the same round; GFLOPs: its matrix products. "
        f"{_INSIDE.format(', '.join(inside)) if inside else ''}"
        f"Template {results['conv_mode']}{f'; {images}' if images else ''}; {where['date']}, {where['device']}, "
        f"{where['threads']} threads, "
        f"torch {where['torch']}, transformers {where['transformers']}, commit {where['git_commit']}."
        + "".join(f" * {name} is incomplete: {'; '.join(sentences)}." for name, sentences in incomplete)
    )


_INSIDE = (
    "{}: the first layers see all visual tokens; counted is what is left after the cut, or with -average the mean over "
    "layers. "
)


def _metrics(rows: list[dict[str, Any]]) -> str:
    """What the scores are; with their rows where that differs, as some answers of theirs have not been judged."""
    named: dict[str, list[str]] = {}
    for row in rows:
        if "metric" in row:
            mark = f"{_UNJUDGED.strip()} " if row.get("unjudged") else ""
            budget = "" if row["tokens"] is None else f" {row['tokens']}"
            named.setdefault(row["metric"], []).append(mark + row["method"] + budget)
    if len(named) > 1:
        return "; ".join(f"{', '.join(own)}: {metric}" for metric, own in named.items())
    return next(iter(named), "not scored here")


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A figure with its standard error, if it has one; ``sign`` may be ``"+"``."""
    return f"{round(value, 1) + 0.0:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")

"""The leaderboard as a plot: accuracy over visual tokens, a labelled line for each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_GAP = 0.036  # between labels, as a share of the axis
_STYLES = ("-", "--", ":")

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]


def draw(board: Mapping[str, Any], path: Path) -> None:
    """Write an SVG file with text as text, so that it stays small.

    Args:
        board: from :func:`eval.reports.leaderboard.join`.
        path: the file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    budgets = sorted(board["tokens"], reverse=True)
    places = list(range(len(budgets)))  # evenly, the most tokens first: the ends that differ most get the labels
    ends = {}
    for number, (name, method) in enumerate(board["methods"].items()):
        values = [_mean(method["scores"], str(budget), "accuracy") for budget in budgets]
        if name == "vanilla":
            axes.plot(places, values, color="black", linewidth=1)
            axes.annotate(
                f"vanilla: all tokens, {values[0]:.1f}", (0, values[0]), (0, 3), textcoords="offset points", fontsize=9
            )
            continue
        errors = [_error(method["scores"], str(budget)) for budget in budgets]
        width = 2.4 if name.startswith("visionzip") else 1.2
        style = {"color": f"C{number % 10}", "linestyle": _STYLES[number // 10 % 3], "linewidth": width}
        axes.errorbar(places, values, errors, marker="o", markersize=3.5, capsize=2, **style)
        ends[name] = (values[-1], style["color"])
    _label(axes, ends, places[-1])
    axes.set(xlabel="visual tokens", ylabel=f"exact match, %, mean of {len(board['questions'])} sets")
    axes.set_xticks(places, [str(budget) for budget in budgets])
    axes.set_xlim(-0.1, places[-1] + 0.08 + 0.3 * max(1, places[-1]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"scenes, {board['model']}", fontsize=10)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "leaderboard"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _label(axes: Any, ends: Mapping[str, tuple[float, str]], x: float) -> None:
    """Write methods' names beside the ends of their lines (value and colour), where they do not overlap."""
    low, high = axes.get_ylim()
    ascending = sorted(ends.items(), key=lambda item: item[1][0])
    heights = spaced([value for _, (value, _) in ascending], (high - low) * _GAP)
    for (name, (value, color)), y in zip(ascending, heights, strict=True):
        axes.annotate(
            f"{name} {value:.1f}",
            (x, value),
            (x + 0.08, y),
            va="center",
            fontsize=9,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1},
            annotation_clip=False,
        )


def spaced(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels, ascending and at least ``gap`` apart, as near to their values as a pass up and down makes."""
    heights: list[list[float]] = []  # runs of labels that touch: their values' mean is their middle
    for value in sorted(values):
        heights.append([value])
        while len(heights) > 1 and _bottom(heights[-1], gap) - _top(heights[-2], gap) < gap:
            heights[-2:] = [heights[-2] + heights[-1]]
    return [_bottom(own, gap) + gap * number for own in heights for number in range(len(own))]


def _bottom(values: Sequence[float], gap: float) -> float:
    return statistics.fmean(values) - gap * (len(values) - 1) / 2


def _top(values: Sequence[float], gap: float) -> float:
    return statistics.fmean(values) + gap * (len(values) - 1) / 2


def _mean(scores: Scores, budget: str, field: str) -> float:
    return statistics.fmean(of_set[budget][field] for of_set in scores.values())


def _error(scores: Scores, budget: str) -> float:
    """Standard error of the mean of several sets, which share no question."""
    return math.hypot(*(of_set[budget]["standard_error"] for of_set in scores.values())) / len(scores)

"""From answers to figures: accuracy with its standard error, what is kept of vanilla's, and what the tokens cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.answers import Answer
from eval.benchmark import Benchmark, Sample
from eval.methods import Run, by_row

RESAMPLES = 1000  # of the bootstrap; the standard error's own error is then 2 %

Row = tuple[str, int | None]  # method and T: a line of the table, over all seeds


def summarize(
    benchmark: Benchmark, samples: Sequence[Sample], answers: Mapping[Run, Mapping[str, Answer]], cost: dict[str, Any]
) -> dict[str, Any]:
    """The rows of the table and the differences between methods at the same budget.

    Args:
        benchmark: what was asked.
        samples: the questions that count.
        answers: of each run, by question id.
        cost: see :func:`eval.cost.measure_cost`.

    Returns:
        ``rows`` and ``differences``, ready for JSON; accuracies are from 0 to 1.
    """
    runs = by_row(answers)
    scores = {
        row: np.mean(
            [[benchmark.score(sample, answers[run][sample.id].text) for sample in samples] for run in own], axis=0
        )
        for row, own in runs.items()
    }
    of_category = {
        category: np.array([sample.category == category for sample in samples]) for category in benchmark.categories
    }
    every = np.ones(len(samples), dtype=bool)
    resampled = bootstrap(np.stack(list(scores.values()), axis=1), [every, *of_category.values()])
    columns = {row: number for number, row in enumerate(runs)}
    vanilla = scores.get(("vanilla", None))

    def mean_and_error(row: Row, part: int, mask: np.ndarray) -> dict[str, float] | None:
        if not mask.any():
            return None
        spread = np.nanstd(resampled[:, part, columns[row]], ddof=1)
        return {"mean": float(scores[row][mask].mean()), "standard_error": float(spread)}

    rows = []
    for row, own in runs.items():
        overall = mean_and_error(row, 0, every)
        budget = own[0].budget
        visual = visual_tokens(answers, own, samples)
        rows.append(
            {
                "method": row[0],
                "tokens": row[1],
                "dominant": budget[0] if budget else None,
                "contextual": budget[1] if budget else None,
                "visual_tokens": visual,
                "accuracy": {
                    category: mean_and_error(row, part, mask)
                    for part, (category, mask) in enumerate(of_category.items(), start=1)
                },
                "overall": overall,
                "overall_by_seed": {
                    str(run.seed): statistics.fmean(benchmark.score(s, answers[run][s.id].text) for s in samples)
                    for run in own
                    if run.seed is not None
                },
                "of_vanilla": (
                    float(overall["mean"] / vanilla.mean()) if vanilla is not None and vanilla.any() else None
                ),
                **_cost_of(own[0], prompt_length(cost["text_tokens"], visual), answers, samples, cost),
            }
        )
    return {"rows": rows, "differences": _differences(scores, resampled[:, 0], columns)}


def bootstrap(scores: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Means over questions drawn again and again, with replacement.

    All columns and masks are taken from the same draws, so that differences between them are paired.

    Args:
        scores: (Q, R) of Q questions in R rows of the table.
        masks: P masks (Q,) of the questions that count in each part.

    Returns:
        (RESAMPLES, P, R) means; NaN where a draw has no question of a part.
    """
    rng = np.random.default_rng(0)
    questions = len(scores)
    means = np.full((RESAMPLES, len(masks), scores.shape[1]), np.nan)
    for draw in means:
        counts = np.bincount(rng.integers(questions, size=questions), minlength=questions)
        for part, mask in enumerate(masks):
            weights = counts * mask
            if weights.any():
                draw[part] = weights @ scores / weights.sum()
    return means


def visual_tokens(answers: Mapping[Run, Mapping[str, Answer]], runs: Sequence[Run], samples: Sequence[Sample]) -> float:
    """Mean number of visual tokens that reached the language model in some runs."""
    return statistics.fmean(answers[run][sample.id].visual_tokens for run in runs for sample in samples)


def prompt_length(text_tokens: int, visual: float) -> int:
    """Tokens of the prompt whose prefill stands for a row: the mean question's, with its visual tokens."""
    return text_tokens + round(visual)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}


def _cost_of(
    run: Run,
    length: int,
    answers: Mapping[Run, Mapping[str, Answer]],
    samples: Sequence[Sample],
    cost: dict[str, Any],
) -> dict[str, Any]:
    """Of one row: FLOPs, and seconds with the speed-up over vanilla in the same rounds."""
    prefill, vision = cost["prefill"][str(length)], cost["vision_seconds"].get(run.name)
    found: dict[str, Any] = {
        "prompt_tokens": length,
        "flops": prefill["flops"],
        "paper_flops": prefill["paper_flops"],
        "prefill_seconds": spread(prefill["seconds"]),
        "vision_seconds": vision and spread(vision),
    }
    if (vanilla := Run("vanilla")) in answers:
        whole = prompt_length(cost["text_tokens"], visual_tokens(answers, [vanilla], samples))
        whole_seconds = cost["prefill"][str(whole)]["seconds"]
        ratios = [slow / fast for slow, fast in zip(whole_seconds, prefill["seconds"], strict=True)]
        found["prefill_speed_up"] = spread(ratios)
        if vision:
            whole_vision = cost["vision_seconds"][vanilla.name]
            found["vision_ratio"] = spread([mine / plain for mine, plain in zip(vision, whole_vision, strict=True)])
    return found


def _differences(
    scores: Mapping[Row, np.ndarray], resampled: np.ndarray, columns: Mapping[Row, int]
) -> list[dict[str, Any]]:
    """VisionZip minus every other method of the same budget, question by question."""
    found = []
    for method, tokens in scores:
        own = ("visionzip", tokens)
        if method == "visionzip" or own not in scores:
            continue
        paired = resampled[:, columns[own]] - resampled[:, columns[method, tokens]]
        found.append(
            {
                "tokens": tokens,
                "minus": method,
                "difference": float((scores[own] - scores[method, tokens]).mean()),
                "standard_error": float(paired.std(ddof=1)),
            }
        )
    return found

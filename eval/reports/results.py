"""From answers to figures: scores with their standard errors, what is kept of vanilla's, and what the tokens cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava.measure.report import spread
from llava.methods import METHODS

from ..records import Score
from ..running.answers import Given
from ..running.methods import Run, by_row

RESAMPLES = 1000  # of the bootstrap; the standard error's own error is then 2 %

Row = tuple[str, int | None]  # method and T: a line of the table, over all seeds


def summarize(
    scores: Mapping[Run, Score], answers: Mapping[Run, Mapping[int, Given]], cost: dict[str, Any]
) -> dict[str, Any]:
    """The rows of the table and the differences between methods at the same budget.

    Args:
        scores: of each run; empty where nothing can be scored here.
        answers: of each run, by the place of the question.
        cost: see :func:`eval.running.cost.measure_cost`.

    Returns:
        ``rows`` and ``differences``, ready for JSON, in the unit of the scores. Standard errors are None where a score
        is no mean over questions.
    """
    runs = by_row(answers)
    # (Q,) of each row: what it has of each question, the mean over its seeds
    points = {
        row: np.mean([scores[run].points for run in own], axis=0)
        for row, own in runs.items()
        if all(run in scores and scores[run].points for run in own)
    }
    if len({len(own) for own in points.values()}) > 1:  # of other questions: they cannot be compared one by one
        points = {}
    resampled = bootstrap(np.stack(list(points.values()), axis=1)) if points else np.empty((0, 0))
    columns = {row: number for number, row in enumerate(points)}
    vanilla = scores.get(Run("vanilla"))
    rows = []
    for row, own in runs.items():
        budget = own[0].budget
        visual = visual_tokens(answers, own)
        length = prompt_length(cost["text_tokens"], visual)
        # of the prompt whose prefill was timed
        seen = [n - cost["text_tokens"] for n in prefill_of(own[0], length, cost)["lengths"]]
        entry: dict[str, Any] = {
            "method": row[0],
            "tokens": row[1],
            "dominant": budget[0] if budget else None,
            "contextual": budget[1] if budget else None,
            "seeds": [run.seed for run in own if run.seed is not None],
            "visual_tokens": visual if (left := METHODS[row[0]].left) is None else left(seen),
            "visual_tokens_by_layer": seen,
            "seconds": _seconds(answers, own),
        }
        if own[0] in scores:
            error = 100 * float(resampled[:, columns[row]].std(ddof=1)) if row in columns else None
            entry |= _scored({run: scores[run] for run in own}, error, vanilla)
        rows.append(entry | _cost_of(own[0], length, answers, cost))
    return {"rows": rows, "differences": _differences(points, resampled, columns)}


def _scored(scores: Mapping[Run, Score], error: float | None, vanilla: Score | None) -> dict[str, Any]:
    """Of one row: its score, the mean over its seeds, with the standard error and what that is of vanilla's."""
    found = list(scores.values())
    mean = statistics.fmean(score.score for score in found)
    return {
        "metric": next((score.metric for score in found if _unjudged(score)), found[0].metric),
        "unjudged": sum(map(_unjudged, found)),
        "score": mean,
        "standard_error": error,
        "score_by_seed": {str(run.seed): score.score for run, score in scores.items() if run.seed is not None},
        "of_vanilla": mean / vanilla.score if vanilla is not None and vanilla.score else None,
        "parts": {
            name: statistics.fmean(score.parts[name] for score in found if name in score.parts)
            for name in found[0].parts
        },
        "details": found[0].details,
    }


def _unjudged(score: Score) -> int:
    """Answers that the judge was asked about without a readable reply."""
    return score.details.get("unjudged", 0)


def bootstrap(points: np.ndarray) -> np.ndarray:
    """Means over questions drawn again and again, with replacement.

    All columns are taken from the same draws, so that differences between them are paired.

    Args:
        points: (Q, R) of Q questions in R rows of the table.

    Returns:
        (RESAMPLES, R) means.
    """
    rng = np.random.default_rng(0)
    questions = len(points)
    draws = (np.bincount(rng.integers(questions, size=questions), minlength=questions) for _ in range(RESAMPLES))
    return np.stack([counts @ points / questions for counts in draws])


def visual_tokens(answers: Mapping[Run, Mapping[int, Given]], runs: Sequence[Run]) -> float:
    """Mean number of visual tokens that reached the language model in some runs, of the questions with any."""
    counted = [given.visual_tokens for run in runs for given in answers[run].values() if given.visual_tokens]
    return statistics.fmean(counted) if counted else 0.0


def _seconds(answers: Mapping[Run, Mapping[int, Given]], runs: Sequence[Run]) -> dict[str, float]:
    """Of all questions together, mean over the seeds: vision tower and projector, prefill, decoding."""
    totals = np.array([given.seconds for run in runs for given in answers[run].values()]).sum(axis=0) / len(runs)
    return dict(zip(("vision", "prefill", "decode"), totals.tolist(), strict=True))


def prompt_length(text_tokens: int, visual: float) -> int:
    """Tokens of the prompt whose prefill stands for a row: the mean question's, with its visual tokens."""
    return text_tokens + round(visual)


def prefill_of(run: Run, length: int, cost: dict[str, Any]) -> dict[str, Any]:
    """The prefill that was timed for a row: with its run's method, or any of that length."""
    return cost["prefill"].get(run.name) or cost["prefill"][str(length)]


def _cost_of(run: Run, length: int, answers: Mapping[Run, Mapping[int, Given]], cost: dict[str, Any]) -> dict[str, Any]:
    """Of one row: FLOPs, and seconds with the speed-up over vanilla in the same rounds."""
    prefill, vision = prefill_of(run, length, cost), cost["vision_seconds"].get(run.name)
    found: dict[str, Any] = {
        "prompt_tokens": length,
        "flops": prefill["flops"],
        "paper_flops": prefill["paper_flops"],
        "prefill_seconds": spread(prefill["seconds"]),
        "vision_seconds": vision and spread(vision),
    }
    if (vanilla := Run("vanilla")) in answers:
        whole = prompt_length(cost["text_tokens"], visual_tokens(answers, [vanilla]))
        whole_seconds = cost["prefill"][str(whole)]["seconds"]
        ratios = [slow / fast for slow, fast in zip(whole_seconds, prefill["seconds"], strict=True)]
        found["prefill_speed_up"] = spread(ratios)
        if vision:
            whole_vision = cost["vision_seconds"][vanilla.name]
            found["vision_ratio"] = spread([mine / plain for mine, plain in zip(vision, whole_vision, strict=True)])
    return found


def _differences(
    points: Mapping[Row, np.ndarray], resampled: np.ndarray, columns: Mapping[Row, int]
) -> list[dict[str, Any]]:
    """VisionZip minus every other method of the same budget, question by question, in points of 100."""
    found = []
    for method, tokens in points:
        own = ("visionzip", tokens)
        if method == "visionzip" or own not in points:
            continue
        paired = resampled[:, columns[own]] - resampled[:, columns[method, tokens]]
        found.append(
            {
                "tokens": tokens,
                "minus": method,
                "difference": 100 * float((points[own] - points[method, tokens]).mean()),
                "standard_error": 100 * float(paired.std(ddof=1)),
            }
        )
    return found

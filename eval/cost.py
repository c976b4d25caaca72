"""What visual tokens cost: time and operations of the prefill, and time of the vision tower."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.answers import Answer
from eval.benchmark import Sample
from eval.methods import Run, attach, by_row, detach
from eval.results import prompt_length, visual_tokens
from llava.benchmark import time_interleaved, time_prefill
from visionzip.flops import llama_prefill_flops, prefill_flops

if TYPE_CHECKING:
    from eval.runner import Prompt

ROUNDS = 15

Answers = Mapping[Run, Mapping[str, Answer]]


def measure_cost(model: Any, prompts: Sequence[Prompt], answers: Answers) -> dict[str, Any]:
    """Time the prefill for each number of visual tokens, and the vision tower with each method, interleaved.

    Args:
        model: with no method on it.
        prompts: all questions, as they are put to the model.
        answers: of each run, with the visual tokens that were counted.

    Returns:
        Ready for JSON. ``text_tokens``: of the mean question. ``prefill``: by prompt length (text and visual tokens),
        ``seconds`` of each round for one prompt, ``flops`` and ``paper_flops``. ``vision_seconds``: by the name of a
        row's first run, seconds of each round for one image, from its pixels to its visual tokens.
    """
    text_tokens = round(statistics.fmean(prompt.text_tokens for prompt in prompts))
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    lengths = _lengths(text_tokens, answers, [prompt.sample for prompt in prompts])
    prefill = {
        str(length): {
            "seconds": seconds,
            "flops": llama_prefill_flops(config, length),
            "paper_flops": prefill_flops(length, *shape),
        }
        for length, seconds in time_prefill(model, lengths, ROUNDS).items()
    }
    vision: dict[str, list[float]] = {}
    if prompt := next((prompt for prompt in prompts if prompt.images), None):
        runs = {own[0].name: own[0] for own in by_row(answers).values()}
        once = partial(model.visual_tokens, prompt.images[:1], prompt.sizes[:1])
        vision = time_interleaved(
            dict.fromkeys(runs, once), model.device, ROUNDS, "time, vision", lambda name: attach(model, runs[name])
        )
        detach(model)
    return {"text_tokens": text_tokens, "prefill": prefill, "vision_seconds": vision}


def read_cost(path: Path, setting: dict[str, Any]) -> dict[str, Any] | None:
    """What :func:`measure_cost` returned earlier in the same setting; None if there is no such file."""
    try:
        cost = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cost if cost.pop("setting", None) == setting else None


def covers(cost: dict[str, Any], answers: Answers, samples: Sequence[Sample]) -> bool:
    """Whether every row of the table finds its timings."""
    lengths = _lengths(cost["text_tokens"], answers, samples)
    names = [own[0].name for own in by_row(answers).values()] if cost["vision_seconds"] else []
    return all(str(length) in cost["prefill"] for length in lengths) and all(
        name in cost["vision_seconds"] for name in names
    )


def _lengths(text_tokens: int, answers: Answers, samples: Sequence[Sample]) -> list[int]:
    """Prompt lengths of all rows, longest first."""
    rows = by_row(answers).values()
    return sorted({prompt_length(text_tokens, visual_tokens(answers, own, samples)) for own in rows}, reverse=True)

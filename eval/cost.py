"""What visual tokens cost: time and operations of the prefill, and time of the vision tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.answers import Given
from eval.methods import Run, attach, by_row, detach
from eval.results import prompt_length, visual_tokens
from llava.benchmark import time_interleaved, time_prefill
from visionzip.flops import llama_prefill_flops, prefill_flops

ROUNDS = 15

Answers = Mapping[Run, Mapping[int, Given]]


def measure_cost(
    model: Any, text_tokens: int, image: tuple[Tensor, tuple[int, int]] | None, answers: Answers
) -> dict[str, Any]:
    """Time the prefill for each number of visual tokens, and the vision tower with each method, interleaved.

    Args:
        model: with no method on it.
        text_tokens: of the mean question.
        image: an image as the model gets it, with its (width, height); None where there are only texts.
        answers: of each run, with the visual tokens that were counted.

    Returns:
        Ready for JSON. ``text_tokens``. ``prefill``: by prompt length (text and visual tokens),
        ``seconds`` of each round for one prompt, ``flops`` and ``paper_flops``. ``vision_seconds``: by the name of a
        row's first run, seconds of each round for one image, from its pixels to its visual tokens.
    """
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    lengths = _lengths(text_tokens, answers)
    prefill = {
        str(length): {
            "seconds": seconds,
            "flops": llama_prefill_flops(config, length),
            "paper_flops": prefill_flops(length, *shape),
        }
        for length, seconds in time_prefill(model, lengths, ROUNDS).items()
    }
    vision: dict[str, list[float]] = {}
    if image is not None:
        runs = {own[0].name: own[0] for own in by_row(answers).values()}
        once = partial(model.visual_tokens, [image[0]], [image[1]])
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


def covers(cost: dict[str, Any], answers: Answers) -> bool:
    """Whether every row of the table finds its timings."""
    lengths = _lengths(cost["text_tokens"], answers)
    names = [own[0].name for own in by_row(answers).values()] if cost["vision_seconds"] else []
    return all(str(length) in cost["prefill"] for length in lengths) and all(
        name in cost["vision_seconds"] for name in names
    )


def _lengths(text_tokens: int, answers: Answers) -> list[int]:
    """Prompt lengths of all rows, longest first."""
    rows = by_row(answers).values()
    return sorted({prompt_length(text_tokens, visual_tokens(answers, own)) for own in rows}, reverse=True)

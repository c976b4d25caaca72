"""What visual tokens cost: time and operations of the prefill, and time of the vision tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.measure.meters.timing import time_interleaved
from visionzip.flops import llama_module_flops, prefill_flops

from ..models.base import Loaded, Model
from ..reports.results import prompt_length, visual_tokens
from .answers import Given
from .methods import Run, by_row

ROUNDS = 15

Answers = Mapping[Run, Mapping[int, Given]]


def measure_cost(model: Model, text_tokens: int, image: Loaded | None, answers: Answers) -> dict[str, Any]:
    """Time the prefill for each number of visual tokens, and the vision tower with each method, interleaved.

    Args:
        model: with no method on it.
        text_tokens: of the mean question.
        image: an image as the model gets it; None where there are only texts.
        answers: of each run, with the visual tokens that were counted.

    Returns:
        Ready for JSON. ``text_tokens``. ``prefill``: by a prompt's length, or by the run's name where its method is at
        work in the language model (FastV, SparseVLM, a size bias), ``seconds`` of each round for one prompt,
        ``lengths`` (the tokens that each layer sees), ``flops`` and ``paper_flops``.
        ``vision_seconds``: by the name of a row's first run, seconds of each round for one image, from its pixels to
        its visual tokens.
    """
    prefill = _measure_prefill(model, text_tokens, answers)
    vision: dict[str, list[float]] = {}
    if image is not None and (once := model.vision(image)) is not None:
        runs = {own[0].name: own[0] for own in by_row(answers).values()}
        timed = time_interleaved(
            dict.fromkeys(runs, once), model.device, ROUNDS, "time, vision", lambda name: model.attach(runs[name])
        )
        model.attach(None)
        vision = {name: own.total for name, own in timed.items()}
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
    rows, timed = _rows(cost["text_tokens"], answers), cost["prefill"]
    if not all(run.name in timed or (not run.inside and str(length) in timed) for run, length in rows):
        return False
    return not cost["vision_seconds"] or all(run.name in cost["vision_seconds"] for run, _ in rows)


@torch.inference_mode()
def _measure_prefill(model: Model, text_tokens: int, answers: Answers) -> dict[str, dict[str, Any]]:
    """From a prompt's embeddings to the logits of its last position, with the KV cache filled, interleaved.

    The vision tower is not in it (it was not in the paper's figures either). The embeddings are random, on which the
    time hardly depends; a method that is at work inside the language model is on it while its own prefill is timed.
    """
    config, ways, on = model.config, {}, {}
    for run, length in sorted(_rows(text_tokens, answers), key=lambda row: -row[1]):
        prefill, is_own = model.prefill(length, text_tokens, run)
        name = run.name if is_own else str(length)
        ways[name], on[name] = prefill, run if run.inside else None

    def before(name: str) -> None:
        model.attach(on[name])

    measured = time_interleaved(ways, model.device, ROUNDS, "time, prefill", before)
    found = {}
    for name, prefill in ways.items():
        before(name)
        cache = prefill().past_key_values
        lengths = [cache.get_seq_length(layer) for layer in range(config.num_hidden_layers)]
        found[name] = {
            "seconds": measured[name].total,
            "lengths": lengths,
            "flops": sum(llama_module_flops(config, lengths).values()),
            "paper_flops": sum(
                prefill_flops(length, 1, config.hidden_size, config.intermediate_size) for length in lengths
            ),
        }
    model.attach(None)
    return found


def _rows(text_tokens: int, answers: Answers) -> list[tuple[Run, int]]:
    """The first run of each row of the table, and the length of the prompt whose prefill stands for it."""
    rows = by_row(answers).values()
    return [(own[0], prompt_length(text_tokens, visual_tokens(answers, own))) for own in rows]

"""What visual tokens cost: time and operations of the prefill, and time of the vision tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.measure.timing import time_interleaved
from llava.methods import detach
from visionzip.flops import llama_module_flops, prefill_flops

from .answers import Given
from .methods import Run, attach, by_row
from .results import prefill_name, prompt_length, visual_tokens

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
        Ready for JSON. ``text_tokens``. ``prefill``: by :func:`eval.results.prefill_name`, ``seconds`` of each round
        for one prompt, ``lengths`` (the tokens that each layer sees), ``flops`` and ``paper_flops``.
        ``vision_seconds``: by the name of a row's first run, seconds of each round for one image, from its pixels to
        its visual tokens.
    """
    prefill = _measure_prefill(model, text_tokens, answers)
    vision: dict[str, list[float]] = {}
    if image is not None:
        runs = {own[0].name: own[0] for own in by_row(answers).values()}
        once = partial(model.visual_tokens, [image[0]], [image[1]])
        measured = time_interleaved(
            dict.fromkeys(runs, once), model.device, ROUNDS, "time, vision", lambda name: attach(model, runs[name])
        )
        vision = {name: own.total for name, own in measured.items()}
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
    prefills = _prefills(cost["text_tokens"], answers)
    names = [own[0].name for own in by_row(answers).values()] if cost["vision_seconds"] else []
    timed = all("lengths" in cost["prefill"].get(name, {}) for name in prefills)
    return timed and all(name in cost["vision_seconds"] for name in names)


@torch.inference_mode()
def _measure_prefill(model: Any, text_tokens: int, answers: Answers) -> dict[str, dict[str, Any]]:
    """From a prompt's embeddings to the logits of its last position, with the KV cache filled, interleaved.

    The vision tower is not in it (it was not in the paper's figures either). The embeddings are random, on which the
    time hardly depends; a method that prunes inside the language model is on it while its own prefill is timed.
    """
    config, weight = model.config, model.get_input_embeddings().weight
    prefills = _prefills(text_tokens, answers)
    ways = {}
    for name, (_, length) in prefills.items():
        prompt = torch.randn(1, length, config.hidden_size, device=weight.device, dtype=weight.dtype)
        visual = torch.arange(length, device=weight.device)[None] < length - text_tokens
        ways[name] = partial(model, inputs_embeds=prompt, visual_mask=visual, use_cache=True, logits_to_keep=1)

    def before(name: str) -> None:
        run, _ = prefills[name]
        detach(model) if run is None else attach(model, run)

    measured = time_interleaved(ways, weight.device, ROUNDS, "time, prefill", before)
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
    detach(model)
    return found


def _prefills(text_tokens: int, answers: Answers) -> dict[str, tuple[Run | None, int]]:
    """Of all rows, by name: the run whose method is on the model (None: none needs to be) and the prompt's length."""
    rows = [(own[0], prompt_length(text_tokens, visual_tokens(answers, own))) for own in by_row(answers).values()]
    return {
        prefill_name(run, length): (run if run.inside else None, length)
        for run, length in sorted(rows, key=lambda row: -row[1])
    }

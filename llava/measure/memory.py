"""The command ``visionzip benchmark memory``: peak memory and KV cache of a prefill."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from llava.measure.meters.peak import Request, peaks, weights_mib
from llava.measure.meters.runner import Runner, Way, make_prompt
from llava.measure.report import Columns, Row, conclude, show
from llava.measure.request import add_request_arguments, check_ways, model_of, setting_of, title_of


def benchmark_memory(args: argparse.Namespace) -> None:
    """Measure the peak memory of weights and one prefill, and the KV cache after it, each way in a fresh process.

    Raises:
        ValueError: a flag is not as it should be, a method refuses the model or the budget, or the checkpoint cannot be
            read.
        RuntimeError: a process failed.
    """
    ways = check_ways(args)
    names = ("shape", "transformers", "model_path", "device", "dtype", "text_tokens")
    shared = {name: getattr(args, name) for name in names}
    rows: list[Row] = []
    for batch in args.batch_sizes:
        requests = {way.name: {**shared, "asked": asdict(way), "batch": batch} for way in ways}
        memory = peaks(prefill_once, requests, f"memory, batch {batch}")
        own = [{"way": way.name, **asdict(way), "batch": batch, **memory[way.name]} for way in ways]
        rows += _with_ratios(own)
    show(title_of(args), _COLUMNS, rows, names=2)
    conclude(args, {"setting": setting_of(args), "results": rows})


_RATIOS = {"memory_mib": "memory_ratio", "over_weights_mib": "over_weights_ratio", "kv_cache_mib": "kv_cache_ratio"}


def _with_ratios(rows: list[Row]) -> list[Row]:
    """Add what each takes over its weights, and ratios to vanilla (None where that was not measured)."""
    rows = [{**row, "over_weights_mib": row["memory_mib"] - row["weights_mib"]} for row in rows]
    vanilla = next((row for row in rows if row["way"] == "vanilla"), None)
    return [{**row, **{_RATIOS[key]: vanilla and row[key] / vanilla[key] for key in _RATIOS}} for row in rows]


def _figures(name: str, key: str) -> Columns:
    by_vanilla = _RATIOS[key]
    return (
        (name, lambda row: f"{row[key]:.1f}"),
        ("ratio", lambda row: "" if row[by_vanilla] is None else f"{row[by_vanilla]:.3f}"),
    )


_COLUMNS: Columns = (
    ("batch", lambda row: str(row["batch"])),
    ("way", lambda row: row["way"]),
    ("visual", lambda row: str(row["visual_tokens"])),
    *_figures("peak MiB", "memory_mib"),
    *_figures("over weights MiB", "over_weights_mib"),
    *_figures("KV MiB", "kv_cache_mib"),
)


@torch.inference_mode()
def prefill_once(request: Request) -> dict[str, Any]:
    """Build the model, put one way on it, answer once: work of which the peak memory is measured."""
    args = argparse.Namespace(**request)
    torch.manual_seed(0)
    model = model_of(args)
    weights = weights_mib(model)
    runner = Runner(model, make_prompt(model, args.text_tokens, args.batch), new_tokens=1)
    runner.attach(Way(**args.asked))
    watch = runner.once()
    return {
        "visual_tokens": watch.prompt_tokens - runner.prompt.text_tokens,
        "weights_mib": weights,
        "kv_cache_mib": watch.cache_bytes / 2**20,
    }


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``visionzip benchmark memory``."""
    add_request_arguments(parser, rounds=None)
    parser.set_defaults(run=benchmark_memory)

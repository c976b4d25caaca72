"""The commands ``visionzip benchmark prefill``, ``generate`` and ``memory``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llava import screen
from llava.arguments import add_measuring_arguments, add_tokens_argument
from llava.benchmark import (
    add_batch_sizes,
    add_plot_argument,
    answer_peak,
    check_request,
    conclude,
    environment,
    peak_memory,
    weights_mib,
    write_results,
)
from llava.commands import positive
from llava.efficiency.measure import Runner, Timed, Way, make_prompt, time_ways
from llava.efficiency.report import make_rows, plot, print_table
from llava.efficiency.shapes import SHAPES, build_model
from llava.files import write_atomically
from llava.methods import METHODS, detach, per_tile
from llava.model.builder import config_values, load_pretrained_model

TIMED = ("vanilla", "visionzip", "fastv", "sparsevlm")  # where --method says nothing


def benchmark_prefill(args: argparse.Namespace) -> None:
    """Time the way from pixels to the first token, phase by phase and method by method, in interleaved rounds.

    "prefill" is the language model's forward alone, as the paper timed it; "first token" counts the vision tower, the
    compression and the projector too. Below the table: the prefill's gain beside that of the bare language model
    between the same two lengths.

    Raises:
        ValueError: a flag is not as it should be, or a method refuses the model, the budget or the batch.
        OSError: the checkpoint cannot be read.
    """
    _time(args, new_tokens=1)


def benchmark_generate(args: argparse.Namespace) -> None:
    """Time whole answers, from pixels to the last token, phase by phase and method by method.

    Raises:
        ValueError: a flag is not as it should be, or a method refuses the model, the budget or the batch.
        OSError: the checkpoint cannot be read.
    """
    _time(args, new_tokens=args.new_tokens)


def benchmark_memory(args: argparse.Namespace) -> None:
    """Measure the peak memory of weights and one prefill, and the KV cache after it, each way in a fresh process.

    Raises:
        ValueError: a flag is not as it should be, a method refuses the model or the budget, or the checkpoint cannot be
            read.
        RuntimeError: a process failed.
    """
    ways = _check(args)
    rows: list[dict[str, Any]] = []
    names = ("shape", "transformers", "model_path", "device", "dtype", "text_tokens")
    shared = {name: getattr(args, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batch_sizes:
            for way in ways:
                report = Path(folder, "report.json")
                request = {**shared, "way": way.name, "asked": asdict(way), "batch": batch, "report": str(report)}
                peak = peak_memory("llava.efficiency.commands", request)
                facts = json.loads(report.read_text())
                rows.append({"way": way.name, **asdict(way), "batch": batch, "memory_mib": peak, **facts})
    whole = {row["batch"]: row for row in rows if row["way"] == "vanilla"}
    columns = ("batch", "way", "visual", "peak MiB", "ratio", "over weights MiB", "ratio", "KV MiB", "ratio")
    lines = []
    for row in rows:
        base = whole.get(row["batch"])
        row["over_weights_mib"] = row["memory_mib"] - row["weights_mib"]
        cells = [str(row["batch"]), row["way"], str(row["visual_tokens"])]
        for key in ("memory_mib", "over_weights_mib", "kv_cache_mib"):
            row[f"{key.removesuffix('_mib')}_ratio"] = None if base is None else row[key] / base[key]
            cells += [f"{row[key]:.1f}", "" if base is None else f"{row[key] / base[key]:.3f}"]
        lines.append(cells)
    screen.print_table(_title(args), columns, lines, left=("way",), names=2)
    conclude(args, {"setting": _setting(args), "results": rows})


def _time(args: argparse.Namespace, new_tokens: int) -> None:
    ways = _check(args)
    torch.manual_seed(0)
    model = _model(args)
    rows = []
    for batch in args.batch_sizes:
        runner = Runner(model, make_prompt(model, args.text_tokens, batch), new_tokens)
        timed, bare = time_ways(runner, ways, args.rounds, bare=new_tokens == 1)
        rows += make_rows(model, runner.prompt, timed, bare)
        report = {"setting": {**_setting(args), "new_tokens": new_tokens}, "results": [asdict(row) for row in rows]}
        if args.output:  # after each batch size: a larger one may not fit
            write_results(args.output, {**environment(args.device), **report})
    print_table(rows, _title(args))
    conclude(args, report)
    if args.plot:
        plot(rows, Path(args.plot), f"{_title(args)}, {environment(args.device)['device']}")


def _check(args: argparse.Namespace) -> list[Way]:
    """The ways to time; all that can be wrong is said here, before a model is built."""
    check_request(args)
    if args.shape and args.model_path:
        raise ValueError(f"--shape {args.shape} and --model-path {args.model_path}: give one of them")
    args.shape = None if args.model_path else args.shape or "llava-next-7b"
    tokens = args.tokens
    if args.model_path and not tokens:
        raise ValueError("--model-path needs --tokens too: visual tokens to keep per image, all its tiles together")
    if args.model_path and config_values(args.model_path).get("mm_vision_tower_aux"):
        raise ValueError(
            f"--model-path {args.model_path} is a Mini-Gemini, whose second tower and mining are no phases of these "
            "commands: use `visionzip benchmark mining`"
        )
    if args.transformers and args.model_path:
        raise ValueError("--transformers is about --shape: a checkpoint's own layout decides, so leave it out")
    args.methods = args.methods or list(TIMED)
    if args.shape:
        shape = SHAPES[args.shape]
        tokens = tokens or [32 * shape.tiles if shape.tiles > 1 else 64]
        for number in tokens:
            per_tile(number, shape.tiles)
            if number >= shape.visual_tokens:
                raise ValueError(
                    f"--tokens {number}: {args.shape} has {shape.visual_tokens} visual tokens per image; give fewer"
                )
    ways = [Way(name, None) for name in ["vanilla"] if name in args.methods]
    ways += [Way(name, number) for number in tokens for name in args.methods if name != "vanilla"]
    if getattr(args, "compile", False):
        if "visionzip" not in args.methods:
            raise ValueError("--compile compiles VisionZip's prefill: have visionzip among --method")
        ways += [Way("visionzip", number, compiled=True) for number in tokens]
    return list(dict.fromkeys(ways))


def _model(args: argparse.Namespace) -> Any:
    dtype = getattr(torch, args.dtype)
    if args.shape:
        return build_model(args.shape, args.device, dtype, args.transformers)
    _, model, _, _ = load_pretrained_model(args.model_path, device=args.device, torch_dtype=dtype)
    detach(model)  # a tuned checkpoint comes zipped
    return model


def _title(args: argparse.Namespace) -> str:
    what = f"{args.shape}, random weights" if args.shape else args.model_path
    what = f"transformers' class, {what}" if args.transformers else what
    return f"{what}, {args.dtype}, {args.text_tokens} text tokens"


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    names = ("shape", "transformers", "model_path", "methods", "dtype", "text_tokens", "rounds")
    return {name: getattr(args, name, None) for name in names}


@torch.inference_mode()
def _prefill_once(request: dict[str, Any]) -> None:
    """What the child process does: build the model, put one way on it, answer once."""
    args = argparse.Namespace(**request)
    torch.manual_seed(0)
    model = _model(args)
    weights = weights_mib(model)
    runner = Runner(model, make_prompt(model, args.text_tokens, args.batch), new_tokens=1)
    runner.attach(Way(**args.asked))
    timed = Timed()
    runner.once(timed)
    facts = {
        "visual_tokens": timed.visual_tokens(runner.prompt),
        "weights_mib": weights,
        "kv_cache_mib": timed.cache_bytes / 2**20,
    }
    write_atomically(Path(args.report), json.dumps(facts))


def add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark prefill``."""
    _add_timing(parser)
    parser.add_argument("--compile", action="store_true", help="time VisionZip under torch.compile too (needs g++)")
    parser.set_defaults(run=benchmark_prefill)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark generate``."""
    _add_timing(parser)
    parser.add_argument(
        "--max-new-tokens",
        "--new-tokens",
        dest="new_tokens",
        type=positive,
        default=32,
        metavar="N",
        help="tokens of each answer, none of which ends before",
    )
    parser.set_defaults(run=benchmark_generate)


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark memory``."""
    _add_arguments(parser, rounds=None)
    parser.set_defaults(run=benchmark_memory)


def _add_arguments(parser: argparse.ArgumentParser, rounds: int | None) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), help="model of random weights (default: llava-next-7b)")
    parser.add_argument("--transformers", action="store_true", help="transformers' own class of that shape")
    parser.add_argument("--model-path", help="checkpoint instead of a shape: folder or hub name (default: a shape)")
    parser.add_argument(
        "--method",
        "--methods",
        dest="methods",
        nargs="+",
        choices=list(METHODS),
        help=f"ways to compare (default: {', '.join(TIMED)})",
    )
    add_tokens_argument(parser, "image, all its tiles together", "160 of a LLaVA-NeXT, else 64")
    parser.add_argument("--text-tokens", type=positive, default=60, metavar="N", help="text tokens of the prompt")
    add_batch_sizes(parser, [1], "prompts at a time")
    add_measuring_arguments(parser, rounds, "bfloat16" if torch.cuda.is_available() else "float32")


def _add_timing(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser, rounds=5)
    add_plot_argument(parser, "latency against visual tokens")


if __name__ == "__main__":
    sys.exit(answer_peak(_prefill_once))

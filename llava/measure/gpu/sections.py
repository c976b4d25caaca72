"""What ``visionzip benchmark gpu`` measures: sections, each of which yields rows as soon as it has them.

A section runs in a process of its own, so that it has the card's memory to itself and a crash is its own. What it needs
is in its request; the small one of ``--scaled`` goes through the same code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.measure import report, tower, tuning
from llava.measure.gpu.graphs import measure_choosers
from llava.measure.gpu.kernels import measure_kernels
from llava.measure.latency import make_rows
from llava.measure.meters.peak import Request, peak_of
from llava.measure.meters.runner import Runner, Way, make_prompt, time_ways
from llava.measure.meters.timing import time_interleaved
from llava.measure.models.qwen import Share, build_qwen, measure_qwen
from llava.measure.models.shapes import build_model
from llava.measure.report import Row
from visionzip import VisionZipConfig
from visionzip.methods import METHODS

Run = Callable[[Request], Iterator[Row]]
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        about: one line.
        kind: of its rows, key of :data:`llava.measure.gpu.tables.TABLES`.
        run: ``(request)`` to rows; the request has ``device`` and ``dtype`` too.
        estimate: seconds on one H100, a guess from operations and launches until there is a run. With less than half
            of it left the section is not begun.
        request: its setting.
        scaled: what is other in a scaled run.
    """

    about: str
    kind: str
    run: Run
    estimate: float
    request: Mapping[str, Any]
    scaled: Mapping[str, Any]


def gpu_tests(request: Request) -> Iterator[Row]:
    """Run the tests that are skipped where there is no GPU, if they and pytest are there: one row, in pytest's words.

    Raises:
        RuntimeError: one failed.
    """
    paths = [str(ROOT / path) for path in request["tests"]]
    if missing := [path for path in paths if not Path(path).exists()]:
        raise RuntimeError(f"{', '.join(missing)} is not there: run this in a checkout of the repository")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *paths, *request["flags"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.strip("= ")]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    yield {
        "way": " ".join(request["tests"]),
        "status": done.returncode,
        "said": (lines or [""])[-1],
        "skipped": skipped,
    }
    if done.returncode:
        raise RuntimeError("\n".join([*lines[-40:], done.stderr[-2000:]]))


def llava(request: Request) -> Iterator[Row]:
    """Time whole answers of a LLaVA phase by phase, and measure the peak memory, each method at its budgets."""
    model = build_model(request["shape"], request["device"], getattr(torch, request["dtype"]))
    smallest = min(request["tokens"])
    ways = [Way("vanilla"), *(Way("visionzip", tokens) for tokens in request["tokens"])]
    ways += [Way(method, smallest) for method in ("fastv", "sparsevlm")]
    for batch in request["batches"]:
        torch.manual_seed(0)
        runner = Runner(model, make_prompt(model, request["text_tokens"], batch), request["new_tokens"])
        timed, bare = time_ways(runner, ways, request["rounds"], bare=True)
        rows = make_rows(model, runner.prompt, timed, bare, request["new_tokens"])
        for way, row in zip(timed, rows, strict=True):
            runner.attach(way)
            with torch.inference_mode():
                row["memory_mib"] = peak_of(runner.once, request["device"])[1]
            yield {"model": request["shape"], "image": f"{runner.prompt.size[0]} x {runner.prompt.size[1]}", **row}
        runner.detach()
        del runner


def qwen(request: Request) -> Iterator[Row]:
    """Time whole answers of a Qwen-VL at shares of its tokens, beside a smaller picture; also of large images."""
    model = build_qwen(request["shape"], request["device"], getattr(torch, request["dtype"]))
    shares = [Share("vanilla"), *(Share(method, keep) for method, keep in request["ways"])]
    for size, batch, rounds in request["cases"]:
        torch.manual_seed(0)
        for row in measure_qwen(model, tuple(size), batch, shares, rounds, request["new_tokens"]):
            yield {"model": request["shape"], **row}


def choosing(request: Request) -> Iterator[Row]:
    """Time what each method adds behind the vision tower, in rounds with the tower itself."""
    device, tokens = request["device"], request["tokens"]
    model = tower.build_tower(request["shape"], device, getattr(torch, request["dtype"]))
    edge, side = model.config.image_size, model.num_patches_per_side
    settings = {}
    for name, method in METHODS.items():
        with suppress(ValueError):  # not every number can be pooled
            method.check(tokens, (side, side))
            settings[name] = VisionZipConfig(keep=tokens, method=name)
    for batch in request["batches"]:
        images = torch.randn(batch, 3, edge, edge, device=device, dtype=model.dtype)
        forward = tower.forward_of("unzipped", model, 1, 1)
        ways = {"unzipped": partial(forward, images), **tower.choices(model, images, settings)}
        times = time_interleaved(ways, device, request["rounds"], f"choosing, batch {batch}")
        for name in settings:
            yield tower.choice_row(name, tokens, batch, times[name], times["unzipped"])


def greedy(request: Request) -> Iterator[Row]:
    """Time the greedy choosers as they are and as a CUDA graph, or with a ``backend`` compiled."""
    for patches, counts in request["cases"]:
        yield from measure_choosers(
            patches, request["width"], counts, request["device"], request["rounds"], request["backend"]
        )


def tuning_steps(request: Request) -> Iterator[Row]:
    """Time steps of projector tuning, and measure their peak memory: all ways on one model, tower included."""
    args = argparse.Namespace(**request)
    model = tuning.build_model(args.shape, args.device, getattr(torch, args.dtype))
    patches = model.get_vision_tower().num_patches
    steps = {way: tuning.step_of(way, model, args) for way in tuning.WAYS}
    times = time_interleaved(steps, args.device, args.rounds, "tuning")
    memory = {way: {"memory_mib": peak_of(step, args.device)[1]} for way, step in steps.items()}
    zipped = args.dominant + args.contextual
    tokens = {way: zipped if way.startswith("zipped") else patches for way in tuning.WAYS}
    # Off CUDA a step may take nothing on top of the one before it, so that there is no ratio.
    floor = {way: {"memory_mib": max(peak["memory_mib"], 2**-20)} for way, peak in memory.items()}
    for row in report.compare(args.batch_size, tokens, times, floor):
        yield {"model": args.shape, **row}


_LLAVA = {"text_tokens": 60, "new_tokens": 16, "rounds": 3, "batches": [1, 8]}
_TINY_LLAVA = {"shape": "llava-1.5-tiny", "tokens": [32, 16], "new_tokens": 3, "rounds": 1, "batches": [1, 2]}
_TINY_NEXT = {**_TINY_LLAVA, "shape": "llava-next-tiny", "tokens": [40, 20], "batches": [1]}
_MEGAPIXELS = (4032, 3024)  # 12 of them: 15552 tokens of Qwen2.5-VL, 11844 of Qwen3-VL
_QWEN = {
    "ways": [("visionzip", 0.5), ("visionzip", 0.25), ("resize", 0.25)],
    "cases": [((1024, 1024), 1, 3), (_MEGAPIXELS, 1, 2), ((1024, 1024), 8, 2)],
    "new_tokens": 16,
}
_TINY_QWEN = {"cases": [((224, 160), 2, 1)], "new_tokens": 3}
_GREEDY = {"width": 1024, "cases": [(2880, [64, 160, 640])], "rounds": 5, "backend": None}
_TINY_GREEDY = {"width": 16, "cases": [(36, [4])], "rounds": 2}
_TUNING = {"batch_size": 4, "text_tokens": 128, "dominant": 54, "contextual": 10, "rounds": 3}
_TINY_TUNING = {"shape": "llava-1.5-tiny", "batch_size": 2, "text_tokens": 8, "dominant": 9, "contextual": 3}

# In the order of their value, since the last ones may find no time.
SECTIONS: dict[str, Section] = {
    "tests": Section(
        "tests that are skipped without a GPU",
        "tests",
        gpu_tests,
        25,
        {
            "tests": ["tests/method/test_attention.py", "tests/measuring/test_gpu_report.py"],
            "flags": ["--noconftest", "-k", "flash_attention or cuda_graph"],
        },
        {},
    ),
    "kernels": Section(
        "scores by sdpa and flash-attention-2 beside eager attention",
        "kernels",
        measure_kernels,
        25,
        {
            "encoders": ["clip", "qwen2.5-vl-7b", "qwen3-vl-8b"],
            "dtypes": ["float32", "bfloat16"],
            "edge": 1024,
            "tower": "vit-l-14-336",
        },
        {"encoders": ["clip", "qwen2.5-vl-tiny", "qwen3-vl-tiny"], "dtypes": ["float32"], "edge": 128, "tower": "tiny"},
    ),
    "llava-next-7b": Section(
        "LLaVA-NeXT-7B, whole answers",
        "answers",
        llava,
        75,
        {**_LLAVA, "shape": "llava-next-7b", "tokens": [640, 320, 160]},
        _TINY_NEXT,
    ),
    "qwen2.5-vl-7b": Section(
        "Qwen2.5-VL-7B, whole answers",
        "answers",
        qwen,
        75,
        {**_QWEN, "shape": "qwen2.5-vl-7b"},
        {**_TINY_QWEN, "shape": "qwen2.5-vl-tiny"},
    ),
    "qwen3-vl-8b": Section(
        "Qwen3-VL-8B, whole answers",
        "answers",
        qwen,
        75,
        {**_QWEN, "shape": "qwen3-vl-8b"},
        {**_TINY_QWEN, "shape": "qwen3-vl-tiny"},
    ),
    "llava-1.5-7b": Section(
        "LLaVA-1.5-7B, whole answers",
        "answers",
        llava,
        55,
        {**_LLAVA, "shape": "llava-1.5-7b", "tokens": [192, 128, 64]},
        _TINY_LLAVA,
    ),
    "choosing": Section(
        "what each method adds behind the tower of the LLaVAs",
        "choosing",
        choosing,
        20,
        {"shape": "vit-l-14-336", "tokens": 64, "batches": [1, 8], "rounds": 7},
        {"shape": "tiny", "tokens": 16, "batches": [2], "rounds": 1},
    ),
    "graphs": Section("greedy choosers as CUDA graphs", "greedy", greedy, 15, _GREEDY, _TINY_GREEDY),
    "tuning": Section(
        "a step of projector tuning, 7B",
        "tuning",
        tuning_steps,
        40,
        {**_TUNING, "shape": "llava-1.5-7b"},
        {**_TINY_TUNING, "rounds": 1},
    ),
    "llava-next-13b": Section(
        "LLaVA-NeXT-13B, whole answers",
        "answers",
        llava,
        95,
        {**_LLAVA, "shape": "llava-next-13b", "tokens": [640, 320, 160]},
        _TINY_NEXT,
    ),
    "compile": Section(
        "greedy choosers under torch.compile",
        "greedy",
        greedy,
        60,
        {**_GREEDY, "backend": "inductor"},
        {**_TINY_GREEDY, "backend": "aot_eager"},
    ),
}

"""``visionzip benchmark frames``: what more frames of a video cost Video-LLaVA, with all their tokens and zipped.

The paper's Figure 8: 120 frames at 17 tokens are as long to the language model as 8 frames at 256.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.commands.arguments import add_measuring_arguments
from llava.commands.parsers import positive
from llava.commands.screen import say
from llava.constants import IMAGE_TOKEN_INDEX
from llava.measure import report
from llava.measure.meters.peak import Request, peaks, weights_mib
from llava.measure.meters.runner import FIRST_TOKEN, Watch, Way, marks
from llava.measure.meters.timing import time_interleaved
from llava.measure.models.shapes import SHAPES, build_model
from llava.measure.report import Columns, Row
from visionzip import unzip, visionzip

_VIDEO_SHAPES = [name for name, shape in SHAPES.items() if shape.frames is not None]


def benchmark_frames(args: argparse.Namespace) -> None:
    """Time one question about a video, from pixels to the first token, and measure its peak memory, by frames.

    With all visual tokens and with VisionZip's default of 17 per frame. Times are of interleaved rounds, the memory of
    a fresh process for each way.

    Raises:
        ValueError: a flag is not as it should be.
        RuntimeError: a process that measures memory failed.
    """
    report.check_request(args)
    ways = [Way(method, frames=frames) for frames in sorted(set(args.frames)) for method in ("vanilla", "visionzip")]
    rows = _measure(args, ways)
    title = f"{args.shape}, random weights, {args.dtype}, {args.text_tokens} text tokens"
    report.show(title, _COLUMNS, rows)
    say(f"medians; ratio: the prefill's time by that of {rows[0]['way']} in the same round.", "dim")
    setting = {name: getattr(args, name) for name in ("shape", "frames", "dtype", "text_tokens", "rounds")}
    report.conclude(args, {"setting": setting, "results": rows})
    if args.plot:
        facts = report.environment(args.device)
        _plot(rows, Path(args.plot), f"{title}\n{facts['date']}, {facts['device']}, {facts['threads']} threads")


def _measure(args: argparse.Namespace, ways: Sequence[Way]) -> list[Row]:
    """Make a row of each way; seconds as median and quartiles over the rounds.

    Of each ``vision`` (seconds from pixels to the language model's embeddings), ``prefill`` (its forward),
    ``first_token`` (both), ``prefill_ratio`` over that of the first way, ``memory_mib`` (peak of weights and one
    answer, in a process of its own), of these ``weights_mib``, and the ``kv_cache_mib`` after the prefill.
    """
    shared = {name: getattr(args, name) for name in ("shape", "device", "dtype", "text_tokens")}
    requests = {way.name: {**shared, "method": way.method, "frames": way.frames} for way in ways}
    memory = peaks(answer_once, requests, "memory")
    model = build_model(args.shape, args.device, getattr(torch, args.dtype))
    prompts = {way.name: make_video_prompt(model, way.frames, args.text_tokens) for way in ways}
    todo = {name: partial(_answer, model, *prompt) for name, prompt in prompts.items()}
    by_name = {way.name: way for way in ways}
    measured = time_interleaved(
        todo, args.device, args.rounds, "time", lambda name: _attach(model, by_name[name].method)
    )
    rows = []
    for name, own in measured.items():
        watch: Watch = own.last
        facts = {"way": name, "frames": by_name[name].frames, "zipped": by_name[name].method == "visionzip"}
        rows.append(
            {
                **facts,
                "visual_tokens": watch.prompt_tokens - args.text_tokens,
                "vision": report.spread(own.sum_of("tower", "compression", "projector", "layout")),
                "prefill": report.spread(own.phases["prefill"]),
                "first_token": report.spread(own.sum_of(*FIRST_TOKEN)),
                "prefill_ratio": report.ratio(own.phases["prefill"], measured[ways[0].name].phases["prefill"]),
                **memory[name],
                "kv_cache_mib": watch.cache_bytes / 2**20,
            }
        )
    return rows


def _attach(model: Any, method: str) -> None:
    (visionzip if method == "visionzip" else unzip)(model)


def make_video_prompt(model: Any, frames: int, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Random words and pixels for a Video-LLaVA: ids (1, L) with an ``<image>`` for each frame, video (3, T, h, w)."""
    tower = model.get_video_tower()
    edge = tower.config.image_size
    words = torch.randint(3, model.config.vocab_size, (text_tokens,), device=tower.device)
    before = text_tokens * 35 // 60  # about where LLaVA's template has them
    ids = torch.cat([words[:before], words.new_full((frames,), IMAGE_TOKEN_INDEX), words[before:]])
    return ids[None], torch.randn(3, frames, edge, edge, device=tower.device, dtype=tower.dtype)


def _answer(model: Any, ids: Tensor, video: Tensor) -> Watch:
    """Answer with one token; its phases are marked."""
    with marks(model, model.get_video_tower()) as watch:
        model.generate(ids, images=[video], do_sample=False, max_new_tokens=1)
        watch.mark("decode")
    return watch


@torch.inference_mode()
def answer_once(request: Request) -> dict[str, float]:
    """Build the model and answer one way: work of which the peak memory is measured."""
    model = build_model(request["shape"], request["device"], getattr(torch, request["dtype"]))
    weights = weights_mib(model)
    _attach(model, request["method"])
    _answer(model, *make_video_prompt(model, request["frames"], request["text_tokens"]))
    return {"weights_mib": weights}


_COLUMNS: Columns = (
    ("way", lambda row: row["way"]),
    ("visual tokens", lambda row: str(row["visual_tokens"])),
    ("vision, ms", lambda row: f"{1e3 * row['vision']['median']:.0f}"),
    ("prefill, ms", lambda row: f"{1e3 * row['prefill']['median']:.0f}"),
    ("ratio", lambda row: f"{row['prefill_ratio']['median']:.2f}"),
    ("first token, ms", lambda row: f"{1e3 * row['first_token']['median']:.0f}"),
    ("peak MiB", lambda row: f"{row['memory_mib']:.0f}"),
    ("KV MiB", lambda row: f"{row['kv_cache_mib']:.1f}"),
)


def _plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time and memory against frames, both scales logarithmic.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for zipped, label, color in ((False, "all tokens", "tab:red"), (True, "VisionZip, 17 per frame", "tab:blue")):
        own = [row for row in rows if row["zipped"] == zipped]
        frames = [row["frames"] for row in own]
        for panel, name in zip(panels, ("prefill", "first_token"), strict=False):
            medians = [row[name]["median"] for row in own]
            panel.plot(frames, medians, marker="o", color=color, label=label)
        panels[2].plot(
            frames, [row["memory_mib"] - row["weights_mib"] for row in own], marker="o", color=color, label=label
        )
        for row in own:
            place = (row["frames"], row["prefill"]["median"])
            text = str(row["visual_tokens"])
            panels[0].annotate(text, place, (0, 6), textcoords="offset points", ha="center", fontsize=8)
    panels[0].axhline(rows[0]["prefill"]["median"], color="gray", linewidth=0.8, linestyle="--")
    panels[0].set(title="prefill of the language model", ylabel="s (labels: visual tokens)")
    panels[1].set(title="pixels to first token", ylabel="s")
    panels[2].set(title="peak memory beyond the weights", ylabel="MiB")
    ticks = sorted({row["frames"] for row in rows})
    for panel in panels:
        panel.set(xscale="log", yscale="log", xlabel="frames")
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.margins(0.12)
    panels[1].legend()
    figure.suptitle(title, fontsize=9)
    report.save_figure(figure, path)


def add_frames_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark frames``."""
    cuda = torch.cuda.is_available()
    shape = "video-llava-7b" if cuda else "video-llava-mini"
    parser.add_argument("--shape", choices=_VIDEO_SHAPES, default=shape, help="model of random weights")
    parser.add_argument(
        "--frames", type=positive, nargs="+", default=[8, 32, 120], metavar="N", help="frames of each video"
    )
    parser.add_argument("--text-tokens", type=positive, default=60, metavar="N", help="text tokens of the prompt")
    add_measuring_arguments(parser, 3, "bfloat16" if cuda else "float32")
    report.add_plot_argument(parser, "time and memory against frames")
    parser.set_defaults(run=benchmark_frames)

"""``visionzip benchmark frames``: what more frames of a video cost Video-LLaVA, with all their tokens and zipped.

The paper's Figure 8: 120 frames at 17 tokens are as long to the language model as 8 frames at 256.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llava.arguments import positive
from llava.benchmark import (
    PLOTS,
    answer_peak,
    check_request,
    conclude,
    environment,
    peak_memory,
    time_interleaved,
    weights_mib,
)
from llava.constants import IMAGE_TOKEN_INDEX
from llava.efficiency.measure import marks
from llava.efficiency.report import Spread, ratio, save_figure, spread
from llava.efficiency.shapes import SHAPES, build_model
from llava.files import write_atomically
from visionzip import unzip, visionzip

_VIDEO_SHAPES = [name for name, shape in SHAPES.items() if shape.frames is not None]


@dataclass(frozen=True)
class Way:
    """A number of frames, zipped or with all their tokens."""

    frames: int
    zipped: bool

    @property
    def name(self) -> str:
        """``vanilla-8``, ``visionzip-120``."""
        return f"{'visionzip' if self.zipped else 'vanilla'}-{self.frames}"


@dataclass(frozen=True)
class Row:
    """One way; seconds as median and quartiles over the rounds.

    Attributes:
        way, frames, zipped: what it is.
        visual_tokens: of the video, as they reached the language model.
        vision: seconds from pixels to the language model's embeddings.
        prefill: seconds of the language model's forward.
        first_token: both.
        prefill_ratio: over that of the first way, round by round.
        memory_mib: peak of weights and one answer, in a process of its own.
        weights_mib, kv_cache_mib: of these the weights; the KV cache after the prefill.
    """

    way: str
    frames: int
    zipped: bool
    visual_tokens: int
    vision: Spread
    prefill: Spread
    first_token: Spread
    prefill_ratio: Spread
    memory_mib: float
    weights_mib: float
    kv_cache_mib: float


@dataclass
class _Timed:
    """What the passes of one way have shown so far."""

    vision: list[float]
    prefill: list[float]
    prompt_tokens: int = 0
    cache_bytes: int = 0


def benchmark_frames(args: argparse.Namespace) -> None:
    """Time one question about a video, from pixels to the first token, and measure its peak memory, by frames.

    With all visual tokens and with VisionZip's default of 17 per frame. Times are of interleaved rounds, the memory of
    a fresh process for each way.

    Raises:
        ValueError: a flag is not as it should be.
        RuntimeError: a process that measures memory failed.
    """
    check_request(args)
    ways = [Way(frames, zipped) for frames in sorted(set(args.frames)) for zipped in (False, True)]
    rows = _measure(args, ways)
    title = f"{args.shape}, random weights, {args.dtype}, {args.text_tokens} text tokens"
    _print(rows, title)
    setting = {name: getattr(args, name) for name in ("shape", "frames", "dtype", "text_tokens", "rounds")}
    conclude(args, {"setting": setting, "results": [asdict(row) for row in rows]})
    if args.plot:
        facts = environment(args.device)
        _plot(rows, Path(args.plot), f"{title}\n{facts['date']}, {facts['device']}, {facts['threads']} threads")


def _measure(args: argparse.Namespace, ways: Sequence[Way]) -> list[Row]:
    shared = {name: getattr(args, name) for name in ("shape", "device", "dtype", "text_tokens")}
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            report = str(Path(folder, "report.json"))
            request = {**shared, "way": way.name, "asked": asdict(way), "report": report}
            peak = peak_memory("llava.efficiency.frames", request)
            memory[way] = (peak, json.loads(Path(report).read_text())["weights_mib"])
    model = build_model(args.shape, args.device, getattr(torch, args.dtype))
    timed = {way: _Timed([], []) for way in ways}
    by_name = {way.name: way for way in ways}
    todo: dict[str, Callable[[], Any]] = {
        way.name: partial(_once, model, *make_video_prompt(model, way.frames, args.text_tokens), timed[way])
        for way in ways
    }
    time_interleaved(
        todo, args.device, args.rounds, "time", lambda name: (visionzip if by_name[name].zipped else unzip)(model)
    )
    first = timed[ways[0]].prefill[1:]
    rows = []
    for way, own in timed.items():
        vision, prefill = own.vision[1:], own.prefill[1:]  # without the pass before the timed rounds
        rows.append(
            Row(
                way=way.name,
                frames=way.frames,
                zipped=way.zipped,
                visual_tokens=own.prompt_tokens - args.text_tokens,
                vision=spread(vision),
                prefill=spread(prefill),
                first_token=spread([sum(pair) for pair in zip(vision, prefill, strict=True)]),
                prefill_ratio=ratio(prefill, first),
                memory_mib=memory[way][0],
                weights_mib=memory[way][1],
                kv_cache_mib=own.cache_bytes / 2**20,
            )
        )
    return rows


def make_video_prompt(model: Any, frames: int, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Random words and pixels for a Video-LLaVA: ids (1, L) with an ``<image>`` for each frame, video (3, T, h, w)."""
    tower = model.get_video_tower()
    edge = tower.config.image_size
    words = torch.randint(3, model.config.vocab_size, (text_tokens,), device=tower.device)
    before = text_tokens * 35 // 60  # about where LLaVA's template has them
    ids = torch.cat([words[:before], words.new_full((frames,), IMAGE_TOKEN_INDEX), words[before:]])
    return ids[None], torch.randn(3, frames, edge, edge, device=tower.device, dtype=tower.dtype)


def _once(model: Any, ids: Tensor, video: Tensor, timed: _Timed) -> None:
    """Answer with one token and note the times of the phases."""
    with marks(model, model.get_video_tower()) as watch:
        model.generate(ids, images=[video], do_sample=False, max_new_tokens=1)
        watch.mark("decode")
    timed.vision.append(sum(watch.seconds(phase) for phase in ("tower", "compression", "projector", "layout")))
    timed.prefill.append(watch.seconds("prefill"))
    timed.prompt_tokens, timed.cache_bytes = watch.prompt_tokens, watch.cache_bytes


@torch.inference_mode()
def _answer_once(request: dict[str, Any]) -> None:
    """What the child process does: build the model and answer one way."""
    model = build_model(request["shape"], request["device"], getattr(torch, request["dtype"]))
    write_atomically(Path(request["report"]), json.dumps({"weights_mib": weights_mib(model)}))
    way = Way(**request["asked"])
    if way.zipped:
        visionzip(model)
    _once(model, *make_video_prompt(model, way.frames, request["text_tokens"]), _Timed([], []))


def _print(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    for column in (
        "way",
        "visual tokens",
        "vision, ms",
        "prefill, ms",
        "ratio",
        "first token, ms",
        "peak MiB",
        "KV MiB",
    ):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for row in rows:
        times = [f"{1e3 * each['median']:.0f}" for each in (row.vision, row.prefill, row.first_token)]
        ratios = f"{row.prefill_ratio['median']:.2f}"
        memory = [f"{row.memory_mib:.0f}", f"{row.kv_cache_mib:.1f}"]
        table.add_row(row.way, str(row.visual_tokens), *times[:2], ratios, times[2], *memory)
    Console(width=max(Console().width, 120)).print(table)
    Console().print(f"medians; ratio: the prefill's time by that of {rows[0].way} in the same round.", style="dim")


def _plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time and memory against frames, both scales logarithmic.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for zipped, label, color in ((False, "all tokens", "tab:red"), (True, "VisionZip, 17 per frame", "tab:blue")):
        own = [row for row in rows if row.zipped == zipped]
        frames = [row.frames for row in own]
        for panel, name in zip(panels, ("prefill", "first_token"), strict=False):
            medians = [getattr(row, name)["median"] for row in own]
            panel.plot(frames, medians, marker="o", color=color, label=label)
        panels[2].plot(frames, [row.memory_mib - row.weights_mib for row in own], marker="o", color=color, label=label)
        for row in own:
            place = (row.frames, row.prefill["median"])
            text = f"{row.visual_tokens}"
            panels[0].annotate(text, place, (0, 6), textcoords="offset points", ha="center", fontsize=8)
    panels[0].axhline(rows[0].prefill["median"], color="gray", linewidth=0.8, linestyle="--")
    panels[0].set(title="prefill of the language model", ylabel="s (labels: visual tokens)")
    panels[1].set(title="pixels to first token", ylabel="s")
    panels[2].set(title="peak memory beyond the weights", ylabel="MiB")
    ticks = sorted({row.frames for row in rows})
    for panel in panels:
        panel.set(xscale="log", yscale="log", xlabel="frames")
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.margins(0.12)
    panels[1].legend()
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def add_frames_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark frames``."""
    cuda = torch.cuda.is_available()
    shape = "video-llava-7b" if cuda else "video-llava-mini"
    parser.add_argument("--shape", choices=_VIDEO_SHAPES, default=shape, help=f"model of random weights ({shape})")
    parser.add_argument("--frames", type=positive, nargs="+", default=[8, 32, 120], help="of the videos (8 32 120)")
    parser.add_argument("--text-tokens", type=positive, default=60, help="of the prompt (60)")
    parser.add_argument("--rounds", type=positive, default=3, help="timed rounds of all ways (3)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cuda or cpu")
    default = "bfloat16" if cuda else "float32"
    types = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=types, default=default, help=f"weights' type ({default})")
    parser.add_argument("--output", help="also write the results to this JSON file")
    parser.add_argument("--plot", help=f"draw time and memory against frames ({', '.join(PLOTS)})")


if __name__ == "__main__":
    sys.exit(answer_peak(_answer_once))

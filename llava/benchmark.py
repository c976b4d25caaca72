"""What compression costs and gains: ``visionzip benchmark tower``, and the interleaved timing of others.

Everything that is compared is interleaved in one process, so that a noisy machine disturbs all alike; peak memory is
measured in a fresh process each. Ratios carry over to other machines better than times. For the tower these are four
ways through one of random weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig

from llava.arguments import positive, run_command
from llava.efficiency.shapes import VIT_L_14_336, VIT_TINY
from llava.files import write_atomically
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from visionzip import VisionZipConfig, compress_tokens, unzip, visionzip
from visionzip.attention import merge_keys, read_attention

PLOTS = (".png", ".svg", ".pdf")
TOWERS = {"vit-l-14-336": VIT_L_14_336, "tiny": VIT_TINY}  # of the LLaVAs; to try the command itself
WAYS = {
    "vanilla": "LLaVA's tower: sdpa, all layers, all hidden states",
    "unzipped": "this tower without VisionZip: stops at layer -2",
    "zipped": "this tower with VisionZip",
    "released": "VisionZip the released way: eager, attention and hidden states of all layers, then the same merging",
}


@dataclass(frozen=True)
class Measurement:
    """One way at one batch size.

    Attributes:
        batch: images, or samples, at a time.
        visual_tokens: of each image.
        seconds: median time of a forward, or of a step of training.
        time_ratio: median over rounds of its time by vanilla's in the same round.
        time_spread: quartiles of that ratio.
        memory_mib: peak memory of weights and work.
        memory_ratio: by vanilla's.
    """

    way: str
    batch: int
    visual_tokens: int
    seconds: float
    time_ratio: float
    time_spread: tuple[float, float]
    memory_mib: float
    memory_ratio: float


def build_tower(shape: str, device: str, dtype: torch.dtype) -> CLIPVisionTower:
    """A tower of random weights of a named shape."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(**TOWERS[shape]).to_dict()
    args = SimpleNamespace(mm_vision_config=config, mm_vision_select_layer=-2, _attn_implementation="sdpa")
    return CLIPVisionTower(shape, args, delay_load=True).to(device=device, dtype=dtype).eval()


def forward_of(way: str, tower: CLIPVisionTower, dominant: int, contextual: int) -> Callable[[Tensor], Tensor]:
    """The forward that ``way`` (a key of :data:`WAYS`) stands for, on the weights of ``tower``."""
    if way == "vanilla":
        return lambda images: tower.encoder(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    if way == "unzipped":
        return unzip(_sharing_weights(tower))
    if way == "zipped":
        return visionzip(_sharing_weights(tower), dominant=dominant, contextual=contextual)
    eager = _sharing_weights(tower).encoder
    eager.set_attn_implementation("eager")

    def released(images: Tensor) -> Tensor:
        with read_attention(eager.encoder.layers[-2].self_attn, merge_keys) as reader:
            outputs = eager(images, output_hidden_states=True, output_attentions=True)
        scores = outputs.attentions[-2][:, :, 0, 1:].sum(dim=1)
        return compress_tokens(outputs.hidden_states[-2], scores, reader.result(), dominant, contextual).tokens

    return released


def _sharing_weights(tower: CLIPVisionTower) -> CLIPVisionTower:
    """A copy with a configuration of its own but the same parameters."""
    return copy.deepcopy(tower, memo={id(parameter): parameter for parameter in tower.parameters()})


def benchmark_tower(args: argparse.Namespace) -> list[Measurement]:
    """Time all ways interleaved, then measure the peak memory of each.

    Args:
        args: as :func:`add_benchmark_arguments` parses them.
    """
    device, dtype = args.device, getattr(torch, args.dtype)
    tower = build_tower(args.shape, device, dtype)
    edge = tower.config.image_size
    forwards = {way: forward_of(way, tower, args.dominant, args.contextual) for way in WAYS}
    results = []
    for batch in args.batch_sizes:
        images = torch.randn(batch, 3, edge, edge, device=device, dtype=dtype)
        ways = {way: partial(forward, images) for way, forward in forwards.items()}
        times = time_interleaved(ways, device, args.rounds, f"time, batch {batch}")
        with ThreadPoolExecutor(max_workers=2) as pool:  # each waits for a process of its own
            peaks = pool.map(partial(_peak_memory, args, batch), WAYS)
            named = zip(WAYS, track(peaks, f"memory, batch {batch}", total=len(WAYS), console=_progress()), strict=True)
            memory = dict(named)
        patches, compressed = tower.num_patches, min(args.dominant + args.contextual, tower.sequence_length)
        tokens = dict.fromkeys(WAYS, compressed) | {"vanilla": patches, "unzipped": patches}
        results += compare(batch, tokens, times, memory)
    return results


def compare(
    batch: int, tokens: Mapping[str, int], times: Mapping[str, list[float]], memory: Mapping[str, float]
) -> list[Measurement]:
    """What each way takes, and by what vanilla takes.

    Args:
        batch: images, or samples, at a time.
        tokens: visual tokens of an image, by way.
        times: seconds in each round, by way; one is ``vanilla``.
        memory: peak memory in MiB, by way.
    """
    return [
        Measurement(
            way,
            batch,
            tokens[way],
            statistics.median(own),
            *time_ratio(own, times["vanilla"]),
            memory[way],
            memory[way] / memory["vanilla"],
        )
        for way, own in times.items()
    ]


def time_ratio(times: list[float], base: list[float]) -> tuple[float, tuple[float, float]]:
    """Median over rounds of one way's time by another's in the same round, and the quartiles of that ratio."""
    ratios = [mine / other for mine, other in zip(times, base, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), (quartiles[0], quartiles[2])


@torch.inference_mode()
def time_interleaved(
    ways: Mapping[str, Callable[[], Any]],
    device: str | torch.device,
    rounds: int,
    label: str,
    before: Callable[[str], Any] = lambda way: None,
) -> dict[str, list[float]]:
    """Time several things so that a noisy machine disturbs all alike.

    Args:
        ways: what to run, by name.
        device: where it runs; CUDA is waited for.
        rounds: times that each is timed, after one warm-up; the order turns by one each round.
        label: for the progress bar.
        before: called with a way's name before its clock starts.

    Returns:
        Seconds of each way in each round.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    names = list(ways)
    with Progress(console=_progress()) as progress:
        task = progress.add_task(label, total=(rounds + 1) * len(names))
        for number in range(rounds + 1):
            turn = number % len(names)
            for way in names[turn:] + names[:turn]:
                before(way)
                _synchronize(device)
                start = time.perf_counter()
                ways[way]()
                _synchronize(device)
                if number > 0:
                    times[way].append(time.perf_counter() - start)
                progress.advance(task)
    return times


def _synchronize(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(args: argparse.Namespace, batch: int, way: str) -> float:
    request = {key: getattr(args, key) for key in ("shape", "device", "dtype", "dominant", "contextual")}
    return peak_memory("llava.benchmark", {**request, "way": way, "batch": batch})


def peak_memory(module: str, request: dict[str, Any]) -> float:
    """Peak memory in MiB of weights and work, in a process of its own.

    Args:
        module: what is run; it calls :func:`answer_peak`.
        request: for it, with ``device`` and ``way``.

    Raises:
        ValueError: the request cannot be met.
        RuntimeError: that process failed.
    """
    # Large blocks go back to the system when freed, so that the peak is the program's and not the allocator's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 2:  # of run_command
        raise ValueError(done.stderr.splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {request['way']!r} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def answer_peak(work: Callable[[dict[str, Any]], Any]) -> int:
    """In the process that :func:`peak_memory` starts: do ``work`` with the request, print its peak; exit status."""

    def measure(request: dict[str, Any]) -> None:
        on_cuda = request["device"].startswith("cuda")
        before = 0.0 if on_cuda else _reset_memory_peak()  # of the libraries
        work(request)
        print(torch.cuda.max_memory_allocated() / 2**20 if on_cuda else _memory_peak() - before)

    request = json.loads(sys.argv[1])
    return run_command(f"memory of {request['way']}", measure, request)


@torch.inference_mode()
def _run_once(request: dict[str, Any]) -> None:
    """What the child process does: build one way's tower and run it."""
    device, dtype = request["device"], getattr(torch, request["dtype"])
    tower = build_tower(request["shape"], device, dtype)
    forward = forward_of(request["way"], tower, request["dominant"], request["contextual"])
    edge = tower.config.image_size
    forward(torch.randn(request["batch"], 3, edge, edge, device=device, dtype=dtype))


def _reset_memory_peak() -> float:
    """Set Linux's high-water mark of this process to what is in use now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_peak()


def _memory_peak() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def _progress() -> Console:
    return Console(stderr=True)


def environment(device: str) -> dict[str, str]:
    """What a figure depends on, to be written beside it."""
    cuda = device.startswith("cuda")
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def weights_mib(model: torch.nn.Module) -> float:
    """MiB of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 2**20


def check_request(args: argparse.Namespace) -> None:
    """Check ``--device``, ``--output`` and, if the command has it, ``--plot``, before the long work.

    Raises:
        ValueError: there is no such device, CUDA is asked for and not there, or the plot is of no known type.
        IsADirectoryError: the output is a folder.
        ImportError: a plot is asked for and matplotlib is not installed.
    """
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise ValueError(f"--device {args.device} is no device: use cuda or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this machine has no CUDA")
    if args.output and Path(args.output).is_dir():
        raise IsADirectoryError(f"--output {args.output} is a folder: give a file")
    if plot := getattr(args, "plot", None):
        if Path(plot).suffix not in PLOTS:
            raise ValueError(f"--plot {plot}: give a file that ends in {', '.join(PLOTS)}")
        import matplotlib  # noqa: F401, PLC0415 - an extra


def benchmark(args: argparse.Namespace) -> None:
    """Measure what VisionZip costs in the vision tower: time and peak memory, as ratios of one interleaved run.

    Raises:
        ValueError: a count is below its limit, or there is no such device.
        IsADirectoryError: the output is a folder.
    """
    VisionZipConfig(args.dominant, args.contextual)
    check_request(args)
    budget = f"{args.dominant} + {args.contextual} tokens"
    title = f"{args.shape}, {args.dtype}, random weights, VisionZip {budget}, {args.rounds} rounds"
    report(args, title, WAYS, benchmark_tower(args))


def report(args: argparse.Namespace, title: str, ways: Mapping[str, str], results: list[Measurement]) -> None:
    """Print a table of some measurements and what their ways mean, and write them to ``args.output`` if that is given.

    Args:
        args: of the command; they are written too.
        title: of the table.
        ways: what each is.
        results: rows of the table.
    """
    table = Table(title=title)
    for column in ("batch", "way", "tokens", "time", "ratio", "quartiles", "peak memory", "ratio"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for row in results:
        table.add_row(
            str(row.batch),
            row.way,
            str(row.visual_tokens),
            f"{row.seconds * 1e3:.1f} ms",
            f"{row.time_ratio:.3f}",
            f"{row.time_spread[0]:.3f}-{row.time_spread[1]:.3f}",
            f"{row.memory_mib:.0f} MiB",
            f"{row.memory_ratio:.3f}",
        )
    Console().print(table)
    for way, meaning in ways.items():
        Console().print(f"{way}: {meaning}", style="dim")
    setting = {key: value for key, value in vars(args).items() if isinstance(value, str | int | list)}
    conclude(args, {**setting, "results": [asdict(row) for row in results]})


def conclude(args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Print what the figures depend on, and write it with them to ``args.output`` if that is given."""
    facts = environment(args.device)
    Console().print(" · ".join(f"{key} {value}" for key, value in facts.items()), style="dim")
    if args.output:
        write_results(args.output, {**facts, **content})


def write_results(path: str, results: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(Path(path), json.dumps(results, indent=1))


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark tower``."""
    parser.add_argument("--shape", choices=sorted(TOWERS), default="vit-l-14-336", help="size of the tower")
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1, 5], help="images at a time (default: 1 5)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds of all ways (default: 5)")
    parser.add_argument("--dominant", type=int, default=54, help="tokens to keep, CLS included (default: 54)")
    parser.add_argument("--contextual", type=int, default=10, help="tokens to merge the rest into (default: 10)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="weights' type")
    parser.add_argument("--output", help="also write the results to this JSON file")


if __name__ == "__main__":
    sys.exit(answer_peak(_run_once))

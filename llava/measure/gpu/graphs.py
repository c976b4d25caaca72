"""Choosers on features of random numbers: as they are, as a CUDA graph, and under ``torch.compile``.

A greedy chooser launches a few small kernels for each token that it keeps, so that a GPU waits for the host: a graph is
launched once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from llava.measure.meters.timing import time_interleaved
from llava.measure.report import Row, ratio, spread
from visionzip import VisionZipConfig
from visionzip.methods import METHODS, EncoderRead
from visionzip.methods.base import TokenCounts

GREEDY = ("cen-prune", "divprune", "scope")  # agile's eigenvalues wait for the host, which no graph can hold
Choose = Callable[[], Tensor]


def chooser(method: str, read: EncoderRead, count: int) -> Choose:
    """Return what chooses K patches by a method; it returns their places (B, K)."""
    config, counts = VisionZipConfig(keep=count, method=method), TokenCounts(count, 0, False)
    return lambda: METHODS[method].choose(read, counts, config).kept


def random_read(patches: int, width: int, device: str, batch: int = 1) -> EncoderRead:
    """What an encoder without CLS might have returned: features (B, N, D) and scores of noise."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    features = draw(batch, patches, width)
    return EncoderRead(features, False, scores=draw(batch, patches).softmax(dim=-1), projected=features)


def captured(choose: Choose) -> Choose:
    """Hold all kernels of a choice in one CUDA graph: what is returned replays it into the same tensor."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up, which a graph must not hold
        for _ in range(3):
            choose()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = choose()

    def replay() -> Tensor:
        graph.replay()
        return kept

    return replay


@torch.inference_mode()
def measure_choosers(
    patches: int, width: int, counts: Sequence[int], device: str, rounds: int, backend: str | None = None
) -> Iterator[Row]:
    """Time each greedy chooser in interleaved rounds of its ways.

    Args:
        patches: N.
        width: D.
        counts: the K to try.
        device: where it runs; graphs are CUDA's alone.
        rounds: of each.
        backend: of ``torch.compile``; None compiles nothing and captures graphs.

    Yields:
        A row of each method and K: ``seconds`` by way (``eager``, and ``graph`` or ``compiled``), the ``speed_up`` of
        that other way (None on a CPU without a backend), ``prepared`` (seconds that making it took), and whether it
        makes the ``same_choice``.
    """
    read = random_read(patches, width, device)
    for count in counts:
        for method in GREEDY:
            ways = {"eager": chooser(method, read, count)}
            start = time.perf_counter()
            if backend:
                torch.compiler.reset()
                ways["compiled"] = torch.compile(ways["eager"], backend=backend)
            elif device.startswith("cuda"):
                ways["graph"] = captured(ways["eager"])
            kept = {way: choose().clone() for way, choose in ways.items()}
            yield _row(method, patches, count, ways, kept, time.perf_counter() - start, device, rounds)


def _row(
    method: str,
    patches: int,
    count: int,
    ways: dict[str, Choose],
    kept: dict[str, Tensor],
    prepared: float,
    device: str,
    rounds: int,
) -> Row:
    timed = time_interleaved(ways, device, rounds, f"{method}, {count} of {patches}")
    other = next((way for way in ways if way != "eager"), None)
    return {
        "method": method,
        "patches": patches,
        "tokens": count,
        "other": other,
        "seconds": {way: spread(own.total) for way, own in timed.items()},
        "speed_up": other and ratio(timed["eager"].total, timed[other].total),
        "prepared": prepared if other else None,
        "same_choice": other and torch.equal(kept["eager"], kept[other]),
    }

"""``visionzip benchmark serve``: OpenAI-compatible endpoints under load, one against the other.

Protocol: N clients ask one after the other, each its next question when it has the last token of its answer; a cell is
a number of clients, with images that are all different (``distinct``: the encoder runs for each request) or the same
one (``shared``). In each round the endpoints take turns, for so many seconds each, in an order that turns too; requests
that are under way at the end are waited for and counted in the time. Before a cell, each endpoint answers one question
that does not count. Where an endpoint has vLLM's ``/metrics``, the peak use of its KV cache and the hits of its prefix
cache are read during each turn. Pictures are noise from a seed, sent as JPEG; all endpoints get the same ones in a
round, and none twice. Ratios are of the same round, to the first endpoint.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.commands.parsers import positive
from llava.commands.screen import progress
from llava.measure import report
from llava.measure.client import Endpoint, Reply
from llava.measure.meters.engine import CacheUse, watch_cache
from llava.measure.report import Columns, Row

QUESTIONS = (
    "What color is the circle?",
    "How many shapes are there?",
    "What is the background?",
    "What is on the left?",
)
KINDS = ("distinct", "shared")


@dataclass(frozen=True)
class Load:
    """One endpoint's turn: what its clients got, how long it took, and what its KV cache had to hold."""

    replies: list[Reply]
    seconds: float
    cache: CacheUse

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.replies) / self.seconds

    @property
    def new_tokens(self) -> float:
        """Tokens of answers per second."""
        return sum(reply.new_tokens for reply in self.replies) / self.seconds


def make_picture(seed: Sequence[int], size: int) -> bytes:
    """Make a JPEG file of noise, the same for the same seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    return file.getvalue()


def put_under_load(endpoint: Endpoint, clients: int, kind: str, number: int, args: argparse.Namespace) -> Load:
    """Let clients ask an endpoint for ``args.seconds``.

    Args:
        endpoint: which.
        clients: how many at a time.
        kind: of :data:`KINDS`.
        number: of the round and cell: other rounds have other pictures.
        args: the command's flags.

    Raises:
        ValueError: the server refuses a request.
        OSError: a connection fails.
    """
    start = 0.0

    def client(own: int) -> list[Reply]:
        replies = []
        for turn in itertools.count():
            seed = (args.seed, number) if kind == "shared" else (args.seed, number, own, turn)
            picture = make_picture(seed, args.image_size)
            question = QUESTIONS[(own + turn) % len(QUESTIONS)]
            replies.append(endpoint.ask(question, [picture], args.max_new_tokens, extra_of(args)))
            if time.perf_counter() - start >= args.seconds:
                return replies
        return replies

    with watch_cache(endpoint) as cache:
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            replies = list(itertools.chain.from_iterable(pool.map(client, range(clients))))
        seconds = time.perf_counter() - start
    return Load(replies, seconds, cache)


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest of some values that at least so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def summarize(way: str, clients: int, kind: str, own: Sequence[Load], base: Sequence[Load]) -> Row:
    """Make a row of one endpoint's loads, and of their ratios to another's in the same rounds."""
    replies = [reply for load in own for reply in load.replies]
    first = [reply.first for reply in replies]

    def ratios(value: Any) -> dict[str, Any]:
        return report.ratio([value(load) for load in own], [value(load) for load in base])

    return {
        "way": way,
        "clients": clients,
        "images": kind,
        "requests": len(replies),
        "requests_per_second": statistics.median(load.rate for load in own),
        "rate_ratio": ratios(lambda load: load.rate),
        "first_p50": percentile(first, 50),
        "first_p99": percentile(first, 99),
        "first_ratio": ratios(lambda load: statistics.median(reply.first for reply in load.replies)),
        "tokens_per_second": statistics.median(load.new_tokens for load in own),
        "prompt_tokens": statistics.median(reply.prompt_tokens for reply in replies),
        "kv_peak": max((load.cache.peak for load in own if load.cache.peak is not None), default=None),
        "prefix_hits": _median([load.cache.hits for load in own if load.cache.hits is not None]),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


COLUMNS: Columns = (
    ("clients", lambda row: str(row["clients"])),
    ("images", lambda row: row["images"]),
    ("way", lambda row: row["way"]),
    ("prompt tokens", lambda row: f"{row['prompt_tokens']:.0f}"),
    ("requests/s", lambda row: f"{row['requests_per_second']:.2f}"),
    ("ratio", lambda row: f"{row['rate_ratio']['median']:.2f}"),
    ("quartiles", lambda row: report.quartiles(row["rate_ratio"]["quartiles"])),
    ("first token p50", lambda row: f"{row['first_p50'] * 1e3:.0f} ms"),
    ("p99", lambda row: f"{row['first_p99'] * 1e3:.0f} ms"),
    ("ratio", lambda row: f"{row['first_ratio']['median']:.2f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:.0f}"),
    ("KV cache, peak", lambda row: _share(row["kv_peak"])),
    ("prefix hits", lambda row: _share(row["prefix_hits"])),
    ("requests", lambda row: str(row["requests"])),
)


def benchmark_serve(args: argparse.Namespace) -> None:
    """Put OpenAI-compatible endpoints under the same load in turns: requests/s, time to first token, tokens/s.

    Start them before, for example a model as it is and zipped (docs/serving.md). Each is NAME=URL; ratios are to the
    first. It takes rounds x seconds x endpoints x clients x kinds of images.
    """
    report.check_request(args)
    endpoints = {name: Endpoint(url, args.model) for name, url in map(_named, args.endpoints)}
    if len(endpoints) < len(args.endpoints):
        raise ValueError(f"--endpoints {' '.join(args.endpoints)}: two have the same name")
    extra_of(args)  # checks it
    cells, rows = list(itertools.product(args.images, args.clients)), []
    with progress(len(cells) * args.rounds * len(endpoints), "load", "turns") as bar:
        for index, (kind, clients) in enumerate(cells):
            loads: dict[str, list[Load]] = {name: [] for name in endpoints}
            for endpoint in endpoints.values():
                endpoint.ask(
                    QUESTIONS[0], [make_picture((args.seed, index, 0, 0, 1), args.image_size)], args.max_new_tokens, {}
                )
            for turn in range(args.rounds):
                names = list(endpoints)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    load = put_under_load(endpoints[name], clients, kind, index * args.rounds + turn, args)
                    loads[name].append(load)
                    bar.update()
            base = next(iter(loads.values()))
            rows += [summarize(name, clients, kind, own, base) for name, own in loads.items()]
    report.show("Under load", COLUMNS, rows, names=3)
    if args.plot:
        report.save_figure(draw(rows), Path(args.plot))
    report.conclude(args, {"settings": report.settings_of(args), "rows": rows})


def draw(rows: Sequence[Row]) -> Any:
    """Draw requests/s and time to first token over clients, a line for each endpoint and kind of images."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, way in dict.fromkeys((row["images"], row["way"]) for row in rows):
        own = [row for row in rows if (row["images"], row["way"]) == (kind, way)]
        clients, style = [row["clients"] for row in own], "-" if kind == KINDS[0] else "--"
        left.plot(clients, [row["requests_per_second"] for row in own], style, marker="o", label=f"{way}, {kind}")
        right.plot(clients, [row["first_p50"] * 1e3 for row in own], style, marker="o")
    left.set(xlabel="clients", ylabel="requests/s", ylim=(0, None))
    right.set(xlabel="clients", ylabel="first token, median [ms]", ylim=(0, None))
    left.legend(frameon=False)
    return figure


def _named(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url:
        raise ValueError(f"--endpoints {text}: give NAME=URL, such as zipped=http://127.0.0.1:8000/v1")
    return name, url


def extra_of(args: argparse.Namespace) -> dict[str, Any]:
    """Read ``--extra``.

    Raises:
        ValueError: it is no JSON object.
    """
    text = args.extra
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--extra {text} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f'--extra {text}: give an object, such as {{"ignore_eos": true}}')
    return values


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``visionzip benchmark serve``."""
    parser.add_argument(
        "--endpoints", nargs="+", required=True, metavar="NAME=URL", help="servers; the first is the base"
    )
    parser.add_argument("--model", metavar="NAME", help="as the servers call it (default: the first that each has)")
    parser.add_argument("--clients", nargs="+", type=positive, default=[1, 4, 16], metavar="N", help="at a time")
    parser.add_argument("--images", nargs="+", choices=KINDS, default=list(KINDS), help="of the requests of a round")
    parser.add_argument("--seconds", type=positive, default=20, metavar="S", help="of each endpoint's turn")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="turns of each endpoint in a cell")
    parser.add_argument("--max-new-tokens", type=positive, default=16, metavar="N", help="longest answer")
    parser.add_argument("--image-size", type=positive, default=336, metavar="PIXELS", help="edge of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument(
        "--extra", default="{}", metavar="JSON", help='further fields of requests: vLLM takes {"ignore_eos": true}'
    )
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results (default: only printed)")
    report.add_plot_argument(parser, "requests/s and time to first token")
    parser.set_defaults(run=benchmark_serve, device="cpu")

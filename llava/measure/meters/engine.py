"""What an engine says of its KV cache while it is under load: vLLM's ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llava.measure.client import Endpoint

_USE, _QUERIES, _HITS = "vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
_EVERY = 0.25  # seconds between two looks


@dataclass
class CacheUse:
    """Of one load; each is None where the endpoint does not say it.

    Attributes:
        peak: the largest share of the KV cache's blocks in use, 0 to 1, of a look each quarter of a second.
        hits: share of the prompts' tokens that the prefix cache had, 0 to 1.
    """

    peak: float | None = None
    hits: float | None = None


def read_metric(page: str, name: str) -> list[float]:
    """Return a metric's values, one for each engine of the server; empty where the page has none of that name."""
    lines = (line for line in page.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return [float(line.rpartition(" ")[2]) for line in lines]


@contextmanager
def watch_cache(endpoint: Endpoint) -> Iterator[CacheUse]:
    """Look at an endpoint's metrics during the block, in a thread; endpoints without any are left alone.

    Yields:
        What was seen, complete once the block has ended.
    """
    found, before = CacheUse(), endpoint.metrics()
    peaks, over = [], threading.Event()

    def look() -> None:
        while not over.wait(_EVERY):
            peaks.extend(read_metric(endpoint.metrics(), _USE))

    watcher = threading.Thread(target=look, daemon=True)
    if watched := bool(read_metric(before, _USE) or read_metric(before, _QUERIES)):
        watcher.start()
    try:
        yield found
    finally:
        over.set()
        if watched:
            watcher.join()
            after = endpoint.metrics()
            asked, had = (sum(read_metric(after, name)) - sum(read_metric(before, name)) for name in (_QUERIES, _HITS))
            found.peak = max(peaks, default=None)
            found.hits = had / asked if asked > 0 else None

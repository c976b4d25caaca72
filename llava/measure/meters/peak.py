"""Peak memory of a piece of work, in a process of its own: ``python -m llava.measure.meters.peak WORK REQUEST``."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llava.commands.parsers import run_command
from llava.commands.screen import track

T = TypeVar("T")
Request = dict[str, Any]
Work = Callable[[Request], "dict[str, Any] | None"]


def peaks(work: Work, requests: Mapping[str, Request], label: str, at_once: int = 1) -> dict[str, dict[str, Any]]:
    """Measure the peak memory of some work with several requests.

    Args:
        work: as in :func:`peak_memory`.
        requests: by the name of the way that each is about.
        label: for the progress bar.
        at_once: processes, which share a GPU's memory.

    Returns:
        What :func:`peak_memory` says, by way.
    """
    with ThreadPoolExecutor(max_workers=at_once) as pool:  # each waits for a process of its own
        measured = pool.map(partial(peak_memory, work), ({**each, "way": way} for way, each in requests.items()))
        return dict(zip(requests, track(measured, len(requests), label, "ways"), strict=True))


def peak_memory(work: Work, request: Request) -> dict[str, Any]:
    """Measure the peak memory of weights and work, in a process of its own.

    Args:
        work: a function of a module; called there with the request, it returns further facts.
        request: ready for JSON, with ``device`` and ``way``.

    Returns:
        ``memory_mib``, and the facts.

    Raises:
        ValueError: the request cannot be met.
        RuntimeError: that process failed.
    """
    # Large blocks go back to the system when freed, so that the peak is the program's and not the allocator's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    place = f"{work.__module__}:{work.__qualname__}"
    done = subprocess.run(
        [sys.executable, "-m", "llava.measure.meters.peak", place, json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 2:  # of run_command
        raise ValueError(done.stderr.splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {request['way']!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(place: str, request: Request) -> None:
    """Do the work in this process, and print its peak and facts."""
    module, _, name = place.partition(":")
    work: Work = getattr(importlib.import_module(module), name)
    facts, peak = peak_of(partial(work, request), request["device"])
    print(json.dumps({"memory_mib": peak, **(facts or {})}))


def peak_of(work: Callable[[], T], device: str) -> tuple[T, float]:
    """Do some work in this process.

    Args:
        work: what to do.
        device: where it does that.

    Returns:
        What the work returns; and its peak memory in MiB: on CUDA that of all tensors there, those that were there
        before too; elsewhere what came on top of what the process had.
    """
    on_cuda = device.startswith("cuda")
    before = 0.0
    if on_cuda:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = _reset_memory_peak()  # of the libraries
    found = work()
    if on_cuda:
        return found, torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts pages per core and adds up now and then, so that work without memory may seem to give some back.
    return found, max(0.0, _memory_peak() - before)


def _reset_memory_peak() -> float:
    """Set Linux's high-water mark of this process to what is in use now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_peak()


def _memory_peak() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def weights_mib(model: torch.nn.Module) -> float:
    """MiB of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 2**20


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    sys.exit(run_command(f"memory of {asked['way']}", partial(_measure, sys.argv[1]), asked))

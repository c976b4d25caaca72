"""``visionzip benchmark gpu``: all that only a GPU can show, section by section within a time limit.

Each section (:mod:`llava.measure.gpu.sections`) is a process of its own, which writes its rows down as it has them: one
that fails, crashes or is out of time leaves what it has, and the others go on. The report is written with each row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llava.commands.arguments import add_measuring_arguments
from llava.commands.parsers import finite
from llava.commands.screen import say
from llava.measure import report
from llava.measure.gpu.sections import SECTIONS, Run, Section
from llava.measure.gpu.tables import check_document, update_document

_LEAST = 3.0  # seconds: less is not worth a process
_POLL = 0.2
Report = dict[str, Any]


def benchmark_gpu(args: argparse.Namespace) -> None:
    """Measure all that only a GPU can show, within a time limit, on models of random weights and true shapes.

    Sections run in the order of their value, each in a process of its own. One is begun only if half of its estimate is
    left of --minutes, and ended when they are over; --output and --docs have all rows that were there by then. What
    found no time is measured by a second call with --sections, which leaves the others in --output as they are.
    --scaled runs the same code on tiny shapes, on a CPU too, in less than a minute.

    Raises:
        ValueError: there is no GPU and it is no scaled run, a section is unknown, the limit is not above 0, or the
            document of --docs lacks the markers; or --sections are to go beside figures of another machine.
        OSError: a file cannot be read or written.
    """
    report.check_request(args)
    if not args.scaled and not args.device.startswith("cuda"):
        raise ValueError(
            f"--device {args.device}: true shapes need a GPU of 80 GB; --scaled tries the command on tiny ones"
        )
    if not 0 < args.minutes < float("inf"):
        raise ValueError(f"--minutes {args.minutes:g} must be above 0: the default is 8.8")
    if args.docs:
        check_document(Path(args.docs))
    names = [name for name in SECTIONS if not args.sections or name in args.sections]
    whole = {**_facts(args), "sections": {}}
    before = _earlier(args, whole) if args.sections else {}
    for name in SECTIONS:
        if name in names or name in before:
            whole["sections"][name] = _pending(SECTIONS[name], args.scaled) if name in names else before[name]
    deadline = time.monotonic() + 60 * args.minutes
    with _ended_by_signal():
        for name in names:
            _run(name, args, whole, deadline)
    for name in names:
        own = whole["sections"][name]
        why = f": {own['why'].strip().splitlines()[-1]}" if own["why"] else ""
        say(f"{name}: {own['state']}, {len(own['rows'])} rows, {own['seconds']:.0f} s{why}")


def _facts(args: argparse.Namespace) -> Report:
    flash = None
    with suppress(metadata.PackageNotFoundError):
        flash = metadata.version("flash-attn")
    cuda = {"cuda": torch.version.cuda or "none", "flash_attn": flash or "not installed"}
    own = {"scaled": args.scaled, "minutes": args.minutes, "dtype": args.dtype}
    return {**report.environment(args.device), **cuda, **own}


def _earlier(args: argparse.Namespace, facts: Report) -> Report:
    """Sections that ``--output`` has from an earlier call, which must have been on the same machine and versions.

    Raises:
        ValueError: it was not, or the file is no report.
    """
    if not args.output or not Path(args.output).exists():
        return {}
    try:
        found = json.loads(Path(args.output).read_text(encoding="utf-8"))
        sections = found.pop("sections")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"--output {args.output} is no report of this command: give another file") from error
    for name in facts.keys() - {"date", "minutes", "sections"}:
        if found.get(name) != facts[name]:
            raise ValueError(
                f"--output {args.output} has figures with {name} {found.get(name)}, here it is {facts[name]}: give "
                "another file, or leave --sections out to measure all anew"
            )
    return sections


def _pending(section: Section, scaled: bool) -> Report:
    estimate = None if scaled else section.estimate
    facts = {"about": section.about, "kind": section.kind, "estimate": estimate, "seconds": 0.0}
    return {**facts, "state": "not begun", "why": "the command ended before", "rows": []}


def _run(name: str, args: argparse.Namespace, whole: Report, deadline: float) -> None:
    """Run a section if there is time, and write the report with each of its rows."""
    own, left = whole["sections"][name], deadline - time.monotonic()
    if left < max(_LEAST, (own["estimate"] or 0) / 2):
        takes = own["estimate"] or _LEAST
        own |= {"state": "skipped", "why": f"{max(0, left):.0f} s are left of what may take {takes:g} s"}
        _publish(args, whole)
        return
    say(f"{name}: {own['about']}", "bold")
    section = SECTIONS[name]
    request = {**section.request, **(section.scaled if args.scaled else {}), "device": args.device, "dtype": args.dtype}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _process(section, request, Path(folder), left) as (process, lines):
        own |= {"state": "running", "why": "the command ended before it"}
        while process.is_alive() and time.monotonic() < deadline:
            process.join(_POLL)
            if _collect(lines, own, start):
                _publish(args, whole)
        if process.is_alive():
            own |= {"state": "stopped", "why": f"the limit of {args.minutes:g} minutes was reached"}
        _collect(lines, own, start)
        if own["state"] == "running":
            own |= {"state": "failed", "why": f"its process ended with status {process.exitcode}"}
    _publish(args, whole)


def _collect(lines: Path, own: Report, start: float) -> bool:
    """Take in what a section's process has written; whether that is anything new."""
    own["seconds"] = time.monotonic() - start
    found = lines.read_bytes().split(b"\n")[:-1] if lines.exists() else []  # the last one may not be whole
    rows = [entry["row"] for entry in map(json.loads, found) if "row" in entry]
    for entry in map(json.loads, found[-1:]):
        if "state" in entry:
            own |= entry
    changed = len(rows) > len(own["rows"])
    own["rows"] = rows
    return changed


def _publish(args: argparse.Namespace, whole: Report) -> None:
    if args.output:
        report.write_results(args.output, whole)
    if args.docs:
        update_document(Path(args.docs), whole)


@contextmanager
def _process(section: Section, request: dict[str, Any], folder: Path, limit: float) -> Iterator[tuple[Any, Path]]:
    """Start a section; behind the block it and what it started are ended."""
    lines = folder / "rows.jsonl"
    # Nothing of CUDA may be there before a fork. What is forked on a CPU has its libraries already.
    method = "spawn" if request["device"].startswith("cuda") else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["llava.measure.gpu.sections"])
    process = context.Process(target=work, args=(section.run, request, str(lines), limit))
    process.start()
    try:
        yield process, lines
    finally:
        if process.is_alive():
            with suppress(ProcessLookupError):  # before it has a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.join()


def work(run: Run, request: dict[str, Any], path: str, limit: float) -> None:
    """Run a section in this process, and write a line of JSON for each row, and one for how it ended.

    Args:
        run: of the section.
        request: for it.
        path: of the file.
        limit: seconds after which this process ends itself, should the one that started it be gone.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(int(limit) + 10)
    with Path(path).open("a", encoding="utf-8") as file:

        def write(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        try:
            for row in run(request):
                write({"row": row})
        except BaseException as error:  # whatever it is, the others go on
            last = "".join(traceback.format_exception_only(error)).strip()
            write({"state": "failed", "why": last, "traceback": traceback.format_exc()})
        else:
            write({"state": "done", "why": ""})


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that no section outlives it."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``visionzip benchmark gpu``."""
    parser.add_argument(
        "--minutes",
        type=finite,
        default=8.8,
        metavar="M",
        help="time limit of all sections (default: 8.8, so that all is over in 9)",
    )
    parser.add_argument("--scaled", action="store_true", help="tiny shapes, to try the command without a GPU")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=list(SECTIONS),
        help="only these, beside those that --output has already (default: all)",
    )
    parser.add_argument(
        "--docs", metavar="FILE", help="Markdown file that gets the tables between its markers (default: none)"
    )
    add_measuring_arguments(parser, None, "bfloat16" if torch.cuda.is_available() else "float32")
    parser.set_defaults(run=benchmark_gpu, interrupted="interrupted; --output and --docs have all rows until now")

"""The one clock: things that are compared take turns, round by round, whole or by named phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llava.commands.screen import progress


class Clock:
    """The moments at which the named phases of one pass end; CUDA is waited for.

    Args:
        device: where the pass runs. It begins now.

    Attributes:
        ends: of each phase, in the order in which they were first marked.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._start = self._now()
        self.ends: dict[str, float] = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def mark(self, phase: str) -> None:
        """End a phase now; the next one begins."""
        self.ends[phase] = self._now()

    def seconds(self) -> dict[str, float]:
        """Return the length of each phase, from the end of the one before it."""
        starts = [self._start, *self.ends.values()]
        return {phase: end - start for start, (phase, end) in zip(starts, self.ends.items(), strict=False)}


@dataclass
class Measurement:
    """What one way took, in rounds that it shares with others.

    Attributes:
        total: seconds of each round.
        phases: seconds of each named phase in each round, if a pass marks them.
        last: clock of the last pass, if it marks phases.
    """

    total: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    last: Clock | None = None

    def add(self, seconds: float, marked: Clock | None) -> None:
        """Add a round, and its phases if they were marked."""
        self.total.append(seconds)
        self.last = marked
        for phase, own in marked.seconds().items() if marked else ():
            self.phases.setdefault(phase, []).append(own)

    def sum_of(self, *phases: str) -> list[float]:
        """Add up some phases, round by round."""
        return [sum(each) for each in zip(*(self.phases[phase] for phase in phases), strict=True)]


@torch.inference_mode()
def time_interleaved(
    ways: Mapping[str, Callable[[], Any]],
    device: str | torch.device,
    rounds: int,
    label: str,
    before: Callable[[str], Any] = lambda way: None,
) -> dict[str, Measurement]:
    """Time several things so that a noisy machine disturbs all alike.

    Args:
        ways: what to run, by name. One that returns a :class:`Clock` has marked its phases.
        device: where it runs.
        rounds: times that each is timed, after one warm-up; the order turns by one each round.
        label: for the progress bar.
        before: called with a way's name before its clock starts.

    Returns:
        What each way took.
    """
    measured = {way: Measurement() for way in ways}
    names = list(ways)
    with progress((rounds + 1) * len(names), label, "passes") as bar:
        for number in range(rounds + 1):
            turn = number % len(names)
            for way in names[turn:] + names[:turn]:
                before(way)
                clock = Clock(device)
                found = ways[way]()
                clock.mark("total")
                if number > 0:
                    measured[way].add(clock.seconds()["total"], found if isinstance(found, Clock) else None)
                bar.update()
    return measured

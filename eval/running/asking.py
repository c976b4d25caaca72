"""Putting questions to a model: in which order, by which process, in batches whose images are opened ahead."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch

from llava.commands.screen import progress

from ..benchmark import Benchmark
from ..models.base import Loaded, Model, Prompt
from .answers import Part
from .methods import Run


@dataclass(frozen=True)
class World:
    """The processes that share the work, as torchrun or accelerate have started them."""

    rank: int
    size: int

    def wait(self) -> None:
        """Wait for all processes. If one fails, its launcher stops the others."""
        if self.size > 1:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def world() -> World:
    """The processes that this one is of."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def in_order(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in the order in which they are asked: by length, those about one image together."""
    groups: dict[tuple[str, ...], list[Prompt]] = {}
    for number, prompt in enumerate(prompts):  # texts without an image are groups of their own
        key = tuple(visual.key for visual in prompt.question.visuals) or (f"no image {number}",)
        groups.setdefault(key, []).append(prompt)
    ordered = sorted(groups.values(), key=lambda group: -max(map(_length, group)))
    return [prompt for group in ordered for prompt in sorted(group, key=lambda prompt: -_length(prompt))]


def _length(prompt: Prompt) -> int:
    return prompt.text_tokens + sum(visual.frames or 1 for visual in prompt.question.visuals)


def answer_all(
    model: Model,
    prompts: Sequence[Prompt],
    benchmark: Benchmark,
    parts: Mapping[Run, Part],
    batch_size: int,
    own: World,
) -> None:
    """Answer a process's share of what is not answered yet, and append it to its parts, batch by batch.

    Batches are cut before what is answered is left out, and before they are dealt out: a run that was killed, and one
    of several processes, answer as one that was not. The next batch's images are opened while one is answered.
    """
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)][
        own.rank :: own.size
    ]
    total = sum(map(len, batches)) * len(parts)
    done = sum(prompt.place in part.given for part in parts.values() for batch in batches for prompt in batch)
    with progress(total, "questions", "questions", done, own.rank > 0) as bar, ThreadPoolExecutor(1) as ahead:
        for run, part in parts.items():
            bar.set_description(run.name)
            missing = [batch for batch in batches if any(prompt.place not in part.given for prompt in batch)]
            upcoming: Future[Mapping[str, Loaded]] | None = None
            with model.attached(run):
                for number, batch in enumerate(missing):
                    pixels = model.visuals_of(batch) if upcoming is None else upcoming.result()
                    upcoming = None
                    if number + 1 < len(missing):
                        upcoming = ahead.submit(model.visuals_of, missing[number + 1])
                    new = [prompt.place not in part.given for prompt in batch]
                    found = model.answers_to(batch, pixels, benchmark.max_new_tokens)
                    part.append([one for one, wanted in zip(found, new, strict=True) if wanted])
                    bar.update(sum(new))

"""What a run is: everything that the flags of ``eval run`` say, made once and never changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionzip.config import Positions

from .scoring.judge import ATTEMPTS


@dataclass(frozen=True)
class RunConfig:
    """One benchmark, one model, some methods at some budgets. Fields are called as the flags are.

    Attributes:
        benchmark: its name in :data:`eval.registry.BENCHMARKS`.
        model_path: checkpoint, a folder or a hub name; ``model_base``, ``conv_mode``, ``device``, ``load_8bit`` and
            ``load_4bit`` say how it is loaded, see :func:`llava.commands.loading.load_from_arguments`.
        output: folder of the results.
        method: names in :data:`llava.methods.METHODS`.
        tokens: visual tokens to keep per tile, a run each.
        dominant, contextual: another budget, VisionZip's own two counts; both or neither.
        positions, size_bias: of the methods that choose before the language model, how it takes their tokens, see
            :class:`VisionZipConfig`; None is each method's own.
        seeds: how many, for methods that draw at random.
        batch_size: questions at a time.
        limit: only the first so many questions; None asks all.
        frames: of each video; None takes the benchmark's own number.
        skip_bad: questions whose image or video cannot be read count as wrong.
        data, data_root, from_hub: where the data is, see :func:`eval.running.data.data_of`.
        judge, judge_attempts: who scores, see :func:`eval.running.data.judge_of`.
    """

    benchmark: str
    model_path: str
    output: Path
    model_base: str | None = None
    conv_mode: str | None = None
    device: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    method: tuple[str, ...] = ("vanilla", "visionzip")
    tokens: tuple[int, ...] = ()
    dominant: int | None = None
    contextual: int | None = None
    positions: Positions | None = None
    size_bias: bool | None = None
    seeds: int = 3
    batch_size: int = 8
    limit: int | None = None
    frames: int | None = None
    skip_bad: bool = False
    data: str | None = None
    data_root: str | None = None
    from_hub: str | None = None
    judge: str | None = None
    judge_attempts: int = ATTEMPTS

    @classmethod
    def from_flags(cls, args: Any) -> RunConfig:
        """Read the parsed flags of ``eval run``, which have these names; what is not among them keeps its default."""
        names = (field.name for field in dataclasses.fields(cls))
        values = {name: getattr(args, name) for name in names if hasattr(args, name)}
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "output": Path(args.output)})

    def flags(self) -> list[str]:
        """Write the flags of ``eval run`` that give this, for another process."""
        words = []
        for field in dataclasses.fields(self)[1:]:  # the benchmark is no flag
            value, name = getattr(self, field.name), field.name.replace("_", "-")
            if value == field.default:
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
        return words

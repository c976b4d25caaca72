"""One pass over a benchmark after another: which methods at which budgets, put on a model and taken off again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.methods import METHODS, detach, patches_of
from visionzip import visionzip
from visionzip.config import Positions
from visionzip.methods.visionzip import split


@dataclass(frozen=True)
class Run:
    """One pass over a benchmark: a method at T tokens per image or tile (None: all), with a seed (None: it has none).

    Attributes:
        split: K and M where they are not the paper's share of T.
        positions, size_bias: how the language model takes the tokens, where it is not the method's own way.
    """

    method: str
    tokens: int | None = None
    seed: int | None = None
    split: tuple[int, int] | None = None
    positions: Positions | None = None
    size_bias: bool | None = None

    @property
    def name(self) -> str:
        """Of its answers' file: ``vanilla``, ``visionzip-17-15+2``, ``random-48-seed0``, ``norm-48-original-sized``."""
        parts = [self.method, *(str(part) for part in (self.tokens,) if part is not None)]
        parts += [f"{self.split[0]}+{self.split[1]}"] if self.split else []
        parts += [] if self.seed is None else [f"seed{self.seed}"]
        parts += [] if self.positions is None else [self.positions]
        return "-".join(parts + ([] if self.size_bias is None else ["sized" if self.size_bias else "unsized"]))

    @property
    def inside(self) -> bool:
        """Whether its method prunes inside the language model."""
        return METHODS[self.method].left is not None

    @property
    def budget(self) -> tuple[int, int] | None:
        """K and M, None for methods that have none."""
        split_of = METHODS[self.method].split
        return None if split_of is None else self.split or split_of(self.tokens)


def plan(
    methods: Sequence[str],
    tokens: Sequence[int],
    seeds: int,
    explicit: tuple[int, int] | None = None,
    positions: Positions | None = None,
    size_bias: bool | None = None,
) -> list[Run]:
    """The runs of some methods at some budgets: vanilla once, the others once per budget, random with each seed.

    Args:
        methods: keys of :data:`METHODS`.
        tokens: T, visual tokens per image.
        seeds: how many seeds, from 0.
        explicit: K and M of another budget, of T = K + M.
        positions: of the methods that choose before the language model; None is their own.
        size_bias: the same.

    Raises:
        ValueError: a method needs a budget and there is none, or none of them takes positions or a size bias.
    """
    methods, tokens = list(dict.fromkeys(methods)), list(dict.fromkeys(tokens))
    splits: dict[int, tuple[int, int] | None] = dict.fromkeys(tokens)
    if explicit:
        splits[sum(explicit)] = None if split(sum(explicit)) == explicit else explicit
    at_a_budget = [method for method in methods if method != "vanilla"]
    if at_a_budget and not splits:
        raise ValueError(
            f"--method {at_a_budget[0]} needs a budget: give --tokens, visual tokens to keep per tile, or "
            "--dominant and --contextual"
        )
    language = {"positions": positions, "size_bias": size_bias}
    if language != dict.fromkeys(language) and not any(map(_chooses, at_a_budget)):
        raise ValueError(
            f"--method {' '.join(methods)}: --positions and --size-bias are for tokens that are chosen before the "
            "language model: add such a method, or leave the flags out"
        )
    return [Run("vanilla")] * ("vanilla" in methods) + [
        Run(
            method,
            budget,
            seed,
            own if method == "visionzip" else None,
            **(language if _chooses(method) else {}),
        )
        for budget, own in splits.items()
        for method in at_a_budget
        for seed in (range(seeds) if METHODS[method].seeded else [None])
    ]


def _chooses(method: str) -> bool:
    """Whether a method chooses among the tokens that the language model will get."""
    return METHODS[method].left is None and not METHODS[method].of_picture


def by_row(runs: Iterable[Run]) -> dict[tuple[str, int | None], list[Run]]:
    """Runs of a method at a budget, one for each of its seeds: together they are a row of the table."""
    rows: dict[tuple[str, int | None], list[Run]] = {}
    for run in runs:
        rows.setdefault((run.method, run.tokens), []).append(run)
    return rows


def attach(model: Any, run: Run, trained: Mapping[str, Any] | None = None) -> None:
    """Put a run's method on a model, in the place of any that is on it.

    Args:
        model: gets it.
        run: whose.
        trained: of :func:`trained_setting`.

    Raises:
        ValueError: the model has fewer patches than the budget, or the method is not for this model.
    """
    detach(model)
    if run.tokens is None:
        return
    patches = patches_of(model)
    if patches is not None and run.tokens > patches:
        raise ValueError(f"--tokens {run.tokens}: an image has only {patches} patches in this model; give fewer")
    if run.split is not None:
        visionzip(model, *run.split)
    else:
        METHODS[run.method].attach(model, run.tokens, run.seed or 0)
    language = {"positions": run.positions, "size_bias": run.size_bias}
    given = {name: value for name, value in language.items() if value is not None}
    if _chooses(run.method):
        given |= trained or {}
    if given and model.config.visionzip | given != model.config.visionzip:
        visionzip(model, **model.config.visionzip | given)


def trained_setting(checkpoint: Any) -> dict[str, Any]:
    """What every budget has of the setting that a checkpoint was tuned with: its projector knows that layer's tokens.

    Args:
        checkpoint: its config.

    Returns:
        ``layer`` and ``merge``, as far as it has them.
    """
    stored = getattr(checkpoint, "visionzip", None) or {}
    return {name: stored[name] for name in ("layer", "merge") if name in stored}

"""Ways to a budget of T visual tokens per image: VisionZip, its ablations, and what it has to beat.

FastV and SparseVLM prune inside the language model, so that "T tokens" has two meanings in the literature, and each of
both methods two names here:

* ``fastv`` and ``sparsevlm``: T tokens are left after the cut, recycled ones included. FastV cuts before layer 2, and
  SparseVLM, as the only layer that it scores, after layer 2 (0 is the first): LightCompress's single-layer mode, whose
  180, 114 and 48 kept tokens for 192, 128 and 64 follow from the count. These are the layers of models with 32 or
  more; in a shallower one the cut lies at the same share of its depth, but after a layer at least.
* ``fastv-average`` and ``sparsevlm-average``: T is the average over all layers, as the paper's tables count. FastV
  keeps fewer than T after the same cut; SparseVLM has its released table of layers 2, 6 and 15, for 32 layers only.

Counts are shares of the patches of an image or tile, so that they fit prompts with several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llava.efficiency.methods import fastv_layer, sparsevlm_once, split
from visionzip import unzip, visionzip
from visionzip.baselines import (
    average_pool,
    drop_cls_token,
    fastv,
    fastv_keep,
    random_tokens,
    remove_control,
    remove_pruning,
    sparsevlm,
    uniform_tokens,
)
from visionzip.baselines.sparsevlm import COUNTS, LAYERS, single_layer_keep


@dataclass(frozen=True)
class Run:
    """One pass over a benchmark: a method at T tokens per image or tile (None: all), with a seed (None: it has none).

    Attributes:
        split: K and M where they are not the paper's share of T.
    """

    method: str
    tokens: int | None = None
    seed: int | None = None
    split: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Of its answers' file: ``vanilla``, ``visionzip-48``, ``visionzip-17-15+2``, ``random-48-seed0``."""
        parts = [self.method, *(str(part) for part in (self.tokens,) if part is not None)]
        parts += [f"{self.split[0]}+{self.split[1]}"] if self.split else []
        return "-".join(parts + ([] if self.seed is None else [f"seed{self.seed}"]))

    @property
    def inside(self) -> bool:
        """Whether its method prunes inside the language model."""
        return METHODS[self.method].left is not None

    @property
    def budget(self) -> tuple[int, int] | None:
        """K and M, None for methods that have none."""
        split_of = METHODS[self.method].budget
        return None if split_of is None else self.split or split_of(self.tokens)


@dataclass(frozen=True)
class Method:
    """One way; :func:`attached` takes it off again.

    Attributes:
        summary: one line about it.
        attach: put it on a model that has nothing on it, at the run's budget and seed.
        budget: K dominant tokens (CLS included) and M contextual ones of T; None where there are none.
        seeded: other seeds give other results, so that it is run with several.
        left: for methods that prune inside the language model, the visual tokens that their T counts, of those that
            each of its layers sees; None for those that prune before it.
    """

    summary: str
    attach: Callable[[Any, Run], Any]
    budget: Callable[[int], tuple[int, int]] | None = None
    seeded: bool = False
    left: Callable[[Sequence[float]], float] | None = None


def _without_cls(model: Any, run: Run) -> None:
    dominant, contextual = run.budget
    visionzip(model, dominant + 1, contextual)
    drop_cls_token(model)


def _patches(model: Any) -> int:
    return model.get_vision_tower().num_patches_per_side ** 2


def _fastv(model: Any, run: Run) -> None:
    fastv(model, fastv_layer(model), run.tokens / _patches(model))


def _fastv_average(model: Any, run: Run) -> None:
    layer, patches = fastv_layer(model), _patches(model)
    fastv(model, layer, fastv_keep(run.tokens, patches, model.config.num_hidden_layers, layer) / patches)


def _sparsevlm(model: Any, run: Run) -> None:
    patches = _patches(model)
    sparsevlm_once(model, single_layer_keep(run.tokens, patches) / patches)


def _sparsevlm_average(model: Any, run: Run) -> None:
    published = {tokens / 576: [count / 576 for count in counts] for tokens, counts in COUNTS.items()}
    patches, layers = _patches(model), model.config.num_hidden_layers
    if layers != 32 or run.tokens / patches not in published:
        budgets = ", ".join(f"{share * patches:g}" for share in published)
        raise ValueError(
            f"--method sparsevlm-average --tokens {run.tokens}: SparseVLM's numbers are published for 32 layers and, "
            f"of {patches} patches, {budgets} tokens; this model has {layers} layers. Use sparsevlm, which counts what "
            "is left after the cut"
        )
    sparsevlm(model, published[run.tokens / patches], LAYERS)


METHODS: dict[str, Method] = {
    "vanilla": Method("all visual tokens", lambda model, run: model),
    "visionzip": Method(
        "K dominant tokens (CLS included) and M contextual ones, 27 to 5",
        lambda model, run: visionzip(model, *run.budget),
        split,
    ),
    "dominant-only": Method(
        "ablation: T dominant tokens (CLS included), the rest dropped",
        lambda model, run: visionzip(model, *run.budget),
        lambda tokens: (tokens, 0),
    ),
    "contextual-only": Method(
        "ablation: CLS and T - 1 contextual tokens",
        lambda model, run: visionzip(model, *run.budget),
        lambda tokens: (1, tokens - 1),
    ),
    "no-cls": Method(
        "ablation: as visionzip, but one more patch in the place of CLS",
        _without_cls,
        split,
    ),
    "random": Method(
        "control: T patches at random", lambda model, run: random_tokens(model, run.tokens, run.seed), seeded=True
    ),
    "uniform": Method("control: T evenly spaced patches", lambda model, run: uniform_tokens(model, run.tokens)),
    "pool": Method("control: the patches averaged to T cells", lambda model, run: average_pool(model, run.tokens)),
    "fastv": Method("FastV: T tokens are left after the cut", _fastv, left=lambda seen: seen[-1]),
    "fastv-average": Method("FastV: T tokens on average over the layers", _fastv_average, left=fmean),
    "sparsevlm": Method(
        "SparseVLM, pruning once: T tokens are left after the cut", _sparsevlm, left=lambda seen: seen[-1]
    ),
    "sparsevlm-average": Method(
        "SparseVLM's published layers and numbers: T tokens on average over 32 layers", _sparsevlm_average, left=fmean
    ),
}


# All others hook into LLaVA's own classes.
ON_TRANSFORMERS = ("vanilla", "visionzip", "dominant-only", "contextual-only")


def plan(
    methods: Sequence[str], tokens: Sequence[int], seeds: int, explicit: tuple[int, int] | None = None
) -> list[Run]:
    """The runs of some methods at some budgets: vanilla once, the others once per budget, random with each seed.

    Args:
        methods: keys of :data:`METHODS`.
        tokens: T, visual tokens per image.
        seeds: how many seeds, from 0.
        explicit: K and M of another budget, of T = K + M.

    Raises:
        ValueError: a method needs a budget and there is none.
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
    return [Run("vanilla")] * ("vanilla" in methods) + [
        Run(method, budget, seed, own if method == "visionzip" else None)
        for budget, own in splits.items()
        for method in at_a_budget
        for seed in (range(seeds) if METHODS[method].seeded else [None])
    ]


def by_row(runs: Iterable[Run]) -> dict[tuple[str, int | None], list[Run]]:
    """Runs of a method at a budget, one for each of its seeds: together they are a row of the table."""
    rows: dict[tuple[str, int | None], list[Run]] = {}
    for run in runs:
        rows.setdefault((run.method, run.tokens), []).append(run)
    return rows


@contextmanager
def attached(model: Any, run: Run) -> Iterator[None]:
    """The model with a run's method on it; as it was without any afterwards."""
    try:
        attach(model, run)
        yield
    finally:
        detach(model)


def attach(model: Any, run: Run) -> None:
    """Put a run's method on a model, in the place of any that is on it.

    Raises:
        ValueError: the model has fewer patches than the budget, or the method is not for this model.
    """
    detach(model)
    if run.tokens is None:
        return
    patches = _patches(model)
    if run.tokens > patches:
        raise ValueError(f"--tokens {run.tokens}: an image has only {patches} patches in this model; give fewer")
    METHODS[run.method].attach(model, run)


def detach(model: Any) -> None:
    """Take any method off a model."""
    remove_pruning(model)
    remove_control(model)
    unzip(model)

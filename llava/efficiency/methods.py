"""The methods that are timed: each is a name, a way onto a model and a way off it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from visionzip import unzip, visionzip
from visionzip.baselines import fastv, remove_pruning, sparsevlm
from visionzip.baselines.selection import Keep
from visionzip.baselines.sparsevlm import LAYERS, single_layer_keep


@dataclass(frozen=True)
class Method:
    """One way to a budget of T visual tokens per image.

    Attributes:
        summary: one line about it, with the convention of its budget.
        attach: put it on a model; takes the model, T and the tiles of an image.
        detach: take it off again.
    """

    summary: str
    attach: Callable[[Any, int, int], Any]
    detach: Callable[[Any], Any]


def split(tokens: int, tiles: int = 1) -> tuple[int, int]:
    """K dominant (CLS included) and M contextual tokens of each tile, in the paper's ratio of 27 to 5.

    M is T * 5 / 32, halves rounded up: 64 is 54 + 10, 48 is 40 + 8, 16 is 13 + 3. Source: the paper's budgets.

    Args:
        tokens: T, of all tiles together.
        tiles: of an image.

    Raises:
        ValueError: T does not divide into the tiles.
    """
    if tokens % tiles:
        raise ValueError(f"--tokens {tokens}: an image has {tiles} tiles, so give a multiple of {tiles}")
    own = tokens // tiles
    contextual = (10 * own + 32) // 64
    return own - contextual, contextual


def depth(model: Any, layer: int) -> int:
    """A layer of a model with 32, in one with fewer: at the same share of its depth."""
    return min(layer, round(layer * model.config.num_hidden_layers / 32))


def fastv_layer(model: Any) -> int:
    """The first layer that sees fewer visual tokens: FastV's 2 of 32, but at least 1."""
    return max(1, depth(model, 2))


def sparsevlm_once(model: Any, keep: Keep) -> None:
    """SparseVLM with one layer that prunes, after layer 2 of 32."""
    sparsevlm(model, [keep], [depth(model, LAYERS[0])])


def _fastv(model: Any, tokens: int, tiles: int) -> None:
    fastv(model, fastv_layer(model), tokens)


def _sparsevlm(model: Any, tokens: int, tiles: int) -> None:
    visual = tiles * model.get_vision_tower().num_patches
    sparsevlm_once(model, single_layer_keep(tokens, visual))


METHODS: dict[str, Method] = {
    "vanilla": Method("all visual tokens", lambda model, tokens, tiles: None, lambda model: None),
    "visionzip": Method(
        "K dominant and M contextual tokens, 27 to 5",
        lambda model, tokens, tiles: visionzip(model, *split(tokens, tiles)),
        unzip,
    ),
    "fastv": Method("FastV: T tokens are left after the cut before layer 2", _fastv, remove_pruning),
    "sparsevlm": Method(
        "SparseVLM, pruning once, after layer 2: T tokens are left, recycled ones included", _sparsevlm, remove_pruning
    ),
}

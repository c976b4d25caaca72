"""What can be put on a model for evaluation and timing: the methods of :mod:`visionzip.methods`, and pruning inside it.

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

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from visionzip import unzip, visionzip
from visionzip.integrations import family_of
from visionzip.language import fastv, fastv_keep, remove_pruning, sparsevlm
from visionzip.language.sparsevlm import COUNTS, LAYERS, single_layer_keep
from visionzip.methods import METHODS as CHOOSING
from visionzip.methods.base import Method as Choosing


@dataclass(frozen=True)
class Method:
    """One way to a budget of T visual tokens per image, tile or frame; :func:`detach` takes it off again.

    Attributes:
        summary: one line about it.
        attach: ``(model, tokens, seed)``: put it on a model that has nothing on it.
        paper: where it comes from.
        split: K dominant tokens (CLS included) and M contextual ones of T; None where there are none.
        seeded: other seeds give other results, so that it is run with several.
        left: for methods that prune inside the language model, the visual tokens that their T counts, of those that
            each of its layers sees; None for those that prune before it.
        of_picture: it makes the picture smaller, in whatever prepares it; there is nothing to put on a model.
    """

    summary: str
    attach: Callable[[Any, int, int], Any]
    paper: str = ""
    split: Callable[[int], tuple[int, int]] | None = None
    seeded: bool = False
    left: Callable[[Sequence[float]], float] | None = None
    of_picture: bool = False


def patches_of(model: Any) -> int | None:
    """Patches of an image or tile in a model's vision tower; None where each image has its own number.

    Of transformers' families whose encoder merges patches, the language model's tokens of an image or tile.
    """
    if hasattr(model, "get_vision_tower"):
        return model.get_vision_tower().num_patches_per_side ** 2
    return family_of(model).image_tokens(model)


def layers_of(model: Any) -> int:
    """Layers of a model's text backbone."""
    return model.config.get_text_config().num_hidden_layers


def layer_of(model: Any, layer: int) -> int:
    """Map a layer index of a 32-layer model to a shallower one's depth."""
    return min(layer, round(layer * layers_of(model) / 32))


def fastv_layer(model: Any) -> int:
    """The first layer that sees fewer visual tokens: FastV's 2 of 32, but at least 1."""
    return max(1, layer_of(model, 2))


def _patches_to_prune(model: Any) -> int:
    """Patches of an image or tile, of which pruning keeps a share.

    Raises:
        TypeError: each image has its own number.
    """
    if (patches := patches_of(model)) is None:
        raise TypeError(
            f"images of {type(model).__name__} have any number of tokens, so T per image is no share for FastV and "
            "SparseVLM to keep: use a method that chooses before the language model"
        )
    return patches


def _fastv(model: Any, tokens: int, seed: int) -> None:
    fastv(model, fastv_layer(model), tokens / _patches_to_prune(model))


def _fastv_average(model: Any, tokens: int, seed: int) -> None:
    layer, patches = fastv_layer(model), _patches_to_prune(model)
    fastv(model, layer, fastv_keep(tokens, patches, layers_of(model), layer) / patches)


def _sparsevlm(model: Any, tokens: int, seed: int) -> None:
    patches = _patches_to_prune(model)
    sparsevlm(model, [single_layer_keep(tokens, patches) / patches], [layer_of(model, LAYERS[0])])


def _sparsevlm_average(model: Any, tokens: int, seed: int) -> None:
    published = {number / 576: [count / 576 for count in counts] for number, counts in COUNTS.items()}
    patches, layers = _patches_to_prune(model), layers_of(model)
    if layers != 32 or tokens / patches not in published:
        budgets = ", ".join(f"{share * patches:g}" for share in published)
        raise ValueError(
            f"--method sparsevlm-average --tokens {tokens}: SparseVLM's numbers are published for 32 layers and, "
            f"of {patches} patches, {budgets} tokens; this model has {layers} layers. Use sparsevlm, which counts what "
            "is left after the cut"
        )
    sparsevlm(model, published[tokens / patches], LAYERS)


def _resize(model: Any, tokens: int, seed: int) -> None:
    raise ValueError(
        f"resize makes pictures smaller, but {type(model).__name__} gets all pictures in one size, or in tiles of one: "
        "use uniform, which keeps tokens of a grid"
    )


def _before(method: Choosing, summary: str | None = None, **setting: Any) -> Method:
    """A method that chooses before the language model, as it is put on one; with another ``setting`` than its own."""

    def put(model: Any, tokens: int, seed: int) -> None:
        visionzip(model, keep=tokens, method=method.name, seed=seed, **setting)

    split = method.split if "keys" in method.reads else None  # who merges by keys has K and M: VisionZip, its ablations
    return Method(summary or method.summary, put, method.paper, split, method.seeded)


PLUS = CHOOSING["visionzip-plus"]
FASTV, SPARSEVLM = "FastV, arXiv 2403.06764", "SparseVLM, arXiv 2410.04417"


class _Choosing(Mapping[str, Method]):
    """Those of :mod:`visionzip.methods` as they are now: one's own too, which were added after this was imported."""

    def __getitem__(self, name: str) -> Method:
        return _before(CHOOSING[name])

    def __iter__(self) -> Iterator[str]:
        return iter(CHOOSING)

    def __len__(self) -> int:
        return len(CHOOSING)


_PICTURES = {
    "vanilla": Method("all visual tokens", lambda model, tokens, seed: model),
    "resize": Method("at most T tokens by a smaller picture, where a model takes any size", _resize, of_picture=True),
}
_OTHERS = {
    "plus-choice": _before(PLUS, "visionzip-plus: its choice alone", positions="consecutive", size_bias=False),
    "plus-positions": _before(PLUS, "visionzip-plus without its size bias", size_bias=False),
    "fastv": Method("T tokens are left after the cut", _fastv, FASTV, left=lambda seen: seen[-1]),
    "fastv-average": Method("T tokens on average over the layers", _fastv_average, FASTV, left=fmean),
    "sparsevlm": Method("pruning once: T tokens are left", _sparsevlm, SPARSEVLM, left=lambda seen: seen[-1]),
    "sparsevlm-average": Method(
        "published layers and numbers: T tokens on average over 32 layers", _sparsevlm_average, SPARSEVLM, left=fmean
    ),
}
METHODS: Mapping[str, Method] = ChainMap(_OTHERS, _Choosing(), _PICTURES)  # it lists the last first


def per_tile(tokens: int, tiles: int) -> int:
    """The budget of each tile of an image.

    Args:
        tokens: T, of all tiles together.
        tiles: of an image.

    Raises:
        ValueError: T does not divide into the tiles.
    """
    if tokens % tiles:
        raise ValueError(f"--tokens {tokens}: an image has {tiles} tiles, so give a multiple of {tiles}")
    return tokens // tiles


def detach(model: Any) -> None:
    """Take any method off a model."""
    remove_pruning(model)
    unzip(model)

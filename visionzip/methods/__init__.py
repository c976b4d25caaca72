"""The ways to choose an image's tokens: one file each, and this registry, which everything else reads.

To add a method, write a file with a :class:`Method` in it and add it to :data:`METHODS`; to try one out, assign it:
``METHODS["mine"] = Method("mine", "…", choose)``. Nothing here knows a model, and no model knows a method.
"""

from __future__ import annotations

import difflib

from visionzip.config import Positions, VisionZipConfig
from visionzip.methods import agile, cen_prune, controls, divprune, norm, plus, scope, visionzip
from visionzip.methods.base import EncoderRead, Method, TokenCounts, kept_patches, top_patches
from visionzip.methods.picked import picked

__all__ = [
    "METHODS",
    "EncoderRead",
    "Method",
    "TokenCounts",
    "check_setting",
    "has_size_bias",
    "kept_patches",
    "method_of",
    "picked",
    "positions_of",
    "token_counts",
    "top_patches",
    "uncompressed",
]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        visionzip.METHOD,
        visionzip.DOMINANT_ONLY,
        visionzip.CONTEXTUAL_ONLY,
        visionzip.NO_CLS,
        controls.RANDOM,
        controls.UNIFORM,
        controls.POOL,
        cen_prune.METHOD,
        divprune.METHOD,
        scope.METHOD,
        agile.METHOD,
        norm.METHOD,
        plus.METHOD,
    )
}


def method_of(config: VisionZipConfig) -> Method:
    """Look up the method that a setting names.

    Raises:
        ValueError: there is none of that name.
    """
    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method={config.method!r} is unknown: use one of {', '.join(METHODS)}{hint}")
    return METHODS[config.method]


def positions_of(config: VisionZipConfig) -> Positions:
    """Say where kept tokens stand in the language model: what the setting says, or else the method."""
    return config.positions or method_of(config).positions


def has_size_bias(config: VisionZipConfig) -> bool:
    """Say whether kept tokens are attended to by their size: what the setting says, or else the method."""
    return method_of(config).size_bias if config.size_bias is None else config.size_bias


def uncompressed(config: VisionZipConfig, patches: int, cls_token: bool) -> str | None:
    """Begin the warning of a setting that compresses nothing of N patches; None where it does."""
    counts = token_counts(config, patches, cls_token)
    asked = config.tokens(patches)
    return f"{config} is {asked} tokens" if asked >= counts.total == patches + counts.cls_token else None


def check_setting(
    config: VisionZipConfig, model: object, side: int, lays_out_patches: bool, whole_videos: bool = False
) -> None:
    """Check that a method and its budget fit a model.

    Args:
        config: the setting.
        model: for the message.
        side: patches along an edge of an image.
        lays_out_patches: whether the model does so: with tiles, or by patch info mining.
        whole_videos: whether tokens of a video can be chosen among those of all its frames.

    Raises:
        ValueError: they do not go together: no such method, a budget that it cannot make, a method whose tokens
            stand for areas on a model that lays its patches out or looks closer at them, or ``video_keep`` where videos
            are chosen from frame by frame, or there are none.
    """
    if config.video_keep is not None and not whole_videos:
        raise ValueError(
            f"video_keep={config.video_keep} is for Qwen-VL's families and Gemma 4: this {type(model).__name__} takes "
            "no videos, or chooses among the tokens of each frame alone; leave it out"
        )
    method_of(config).check(config.tokens(side**2), (side, side))
    if lays_out_patches and not method_of(config).keeps_patches:
        fitting = ", ".join(name for name, method in METHODS.items() if method.keeps_patches)
        raise ValueError(
            f"method={config.method!r} averages areas, but this {type(model).__name__} needs to know which patch a "
            f"token is, to lay out tiles or to look closer at it: use one of {fitting}"
        )


def token_counts(config: VisionZipConfig, patches: int, cls_token: bool) -> TokenCounts:
    """Say what a setting leaves of one encoder input of N patches, from shapes alone.

    Args:
        config: the setting.
        patches: N, without CLS.
        cls_token: whether the encoder has a CLS token.

    Raises:
        ValueError: there is no method of that name.
    """
    return method_of(config).counts(config, patches, cls_token)

"""The methods by which tokens are chosen: one file each, and the registry :data:`METHODS` of all of them.

To add a method, write a file with a :class:`Method` in it and add that to :data:`METHODS`. To try one out, assign it:
``METHODS["mine"] = Method("mine", "…", choose)``. No method knows a model, and no model knows a method.
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
        ValueError: no method has that name; the message has the names.
    """
    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method={config.method!r} is unknown: use one of {', '.join(METHODS)}{hint}")
    return METHODS[config.method]


def positions_of(config: VisionZipConfig) -> Positions:
    """Say where kept tokens stand in the language model, by the setting or else by the method's default."""
    return config.positions or method_of(config).positions


def has_size_bias(config: VisionZipConfig) -> bool:
    """Say whether a kept token's attention grows with its size, by the setting or else by the method's default."""
    return method_of(config).size_bias if config.size_bias is None else config.size_bias


def uncompressed(config: VisionZipConfig, patches: int, cls_token: bool) -> str | None:
    """Word the beginning of a warning if a setting compresses nothing of N patches; return None if it compresses."""
    counts = token_counts(config, patches, cls_token)
    asked = config.tokens(patches)
    return f"{config} is {asked} tokens" if asked >= counts.total == patches + counts.cls_token else None


def check_setting(
    config: VisionZipConfig, model: object, side: int, lays_out_patches: bool, whole_videos: bool = False
) -> None:
    """Check that a setting's method and budget fit a model.

    Args:
        config: the setting.
        model: the model, or its config, for the message.
        side: patches along one edge of the encoder's input.
        lays_out_patches: whether the model needs to know the patch of each token: to lay out tiles, or to look closer
            at a patch (patch info mining).
        whole_videos: whether the family can choose among the tokens of all frames of a video at once.

    Raises:
        ValueError: the method is unknown, it cannot make that many tokens, it averages areas and the model needs to
            know patches, or ``video_keep`` is set and the family takes no videos or chooses in each frame alone.
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
    """Count the tokens that a setting keeps of one encoder input of N patches; nothing has to run for that.

    Args:
        config: the setting.
        patches: N, the patches without the CLS token.
        cls_token: whether the encoder has a CLS token.

    Raises:
        ValueError: the method is unknown.
    """
    return method_of(config).counts(config, patches, cls_token)

"""Switch the compression of a model on and off: ``visionzip(model)`` and ``unzip(model)``."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import nn

from visionzip.config import MergeRule, Positions, VisionZipConfig
from visionzip.integrations import Integration, find_integration
from visionzip.methods.visionzip import split

Model = TypeVar("Model", bound=nn.Module)


def visionzip(
    model: Model,
    dominant: int | None = None,
    contextual: int | None = None,
    *,
    keep: int | float | None = None,
    method: str | None = None,
    layer: int | None = None,
    merge: MergeRule | None = None,
    seed: int | None = None,
    positions: Positions | None = None,
    size_bias: bool | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    video_keep: int | float | None = None,
) -> Model:
    """Let a model see only K dominant and M contextual visual tokens per image, tile or frame (arXiv 2412.04467).

    The model is changed in place, and only this one object: no class is modified, and no other model in the process is
    affected. Calling the function again changes the setting, and :func:`unzip` removes it. The setting is stored in
    ``model.config.visionzip``, so that ``save_pretrained`` and ``from_pretrained`` keep it. Nothing is trained.

    :class:`VisionZipConfig` explains every argument after the model. If none of them is given, the setting stored in
    ``model.config.visionzip`` is applied, if there is one.

    Args:
        model: a model of a supported family, a LLaVA vision tower of this repository, or a wrapper of PEFT or
            ``torch.compile`` around one.
        dominant: tokens to keep by attention, CLS included (default: 54; Video-LLaVA: 15 per frame).
        contextual: tokens to merge the others into (default: 10; Video-LLaVA: 2 per frame).
        keep: tokens to keep in all, in place of these two: a number, which VisionZip splits 27 : 5, or a share of the
            patches of each image, tile or frame (0.25). For Qwen-VL and the other families that choose among merged
            tokens the default is 0.5, and a number is an upper limit: smaller images keep all their tokens.
        method: how tokens are chosen: a name of :data:`visionzip.methods.METHODS` (default: ``"visionzip"``). All but
            VisionZip need ``keep``.
        layer: the encoder layer to score (default: -2; models of transformers: their config's
            ``vision_feature_layer``).
        merge: ``"released"`` (default) or ``"average"``.
        seed: the seed of methods that draw at random (default: 0).
        positions: ``"consecutive"`` or ``"original"`` (default: the method's).
        size_bias: whether a kept token's attention grows with the patches it stands for (default: the method's).
        max_tokens: the most tokens of an image, tile or frame if ``keep`` is a share (default: no limit).
        min_tokens: the fewest tokens of one if ``keep`` is a share (default: 1).
        video_keep: how many tokens of a whole video to keep, or their share, chosen among all its frames at once
            (default: tokens are chosen in each frame alone).

    Returns:
        The same object.

    Raises:
        TypeError: the model's family is not supported (the message lists those that are), or a count is not an integer.
        ValueError: a number is outside its limits, the encoder has no such layer, the method is unknown or does not fit
            the model, or the model has no vision tower.

    Warns:
        UserWarning: the budget is the encoder's whole sequence or more, so nothing is compressed.
    """
    if keep is not None and (dominant, contextual) != (None, None):
        raise ValueError(
            f"keep={keep} was given with dominant={dominant}, contextual={contextual}: give one or the other"
        )
    if type(keep) is int and keep > 0 and method in (None, "visionzip"):
        (dominant, contextual), keep = split(keep), None
    setting = {"dominant": dominant, "contextual": contextual, "keep": keep, "method": method}
    setting |= {"layer": layer, "merge": merge, "seed": seed, "positions": positions, "size_bias": size_bias}
    setting |= {"max_tokens": max_tokens, "min_tokens": min_tokens, "video_keep": video_keep}
    target = unwrap(model)
    integration = find_integration(target)
    integration.attach(target, _config(target, integration, setting))
    return model


def _config(model: nn.Module, integration: Integration, setting: dict[str, Any]) -> VisionZipConfig:
    """Complete what the user gave, or else take what the model's config has stored, or else the family's default."""
    given = {name: value for name, value in setting.items() if value is not None}
    stored = getattr(getattr(model, "config", None), "visionzip", None)
    if stored and not given:
        return VisionZipConfig.from_dict(stored)
    if given.keys() & {"dominant", "contextual"}:
        given["keep"] = None  # the family's default may be a share, which would win over these two
    return dataclasses.replace(integration.default(model), **given)


def unzip(model: Model) -> Model:
    """Undo :func:`visionzip`: afterwards the model's outputs are bit-identical to those before it.

    Args:
        model: a model of a supported family, zipped or not.

    Returns:
        The same object.

    Raises:
        TypeError: the model's family is not supported.
        ValueError: the model has no vision tower.
    """
    target = unwrap(model)
    find_integration(target).detach(target)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper of PEFT or ``torch.compile``; any other model is returned itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model

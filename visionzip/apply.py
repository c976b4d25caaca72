"""``visionzip(model)`` and ``unzip(model)``: switch the compression of a model on and off."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import nn

from visionzip.config import MergeRule, Positions, VisionZipConfig
from visionzip.integrations import find_integration
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

    Works in place on this one object: no class is modified and other models in the process are not affected. Calling it
    again re-configures. The setting is stored in ``model.config.visionzip``, so that ``save_pretrained`` and
    ``from_pretrained`` keep it. Nothing is trained; :func:`unzip` takes it off again.

    Args:
        model: a model of a supported family, or LLaVA's vision tower, or a wrapper of PEFT or ``torch.compile`` around
            one.
        dominant: tokens to keep by attention, CLS included (default: 54; Video-LLaVA: 15 per frame).
        contextual: tokens to merge the rest into (default: 10; Video-LLaVA: 2 per frame).
        keep: tokens to keep in all, in the place of these two: a number, which VisionZip splits 27 : 5, or a share of
            the patches of each image, tile or frame (0.25). Default of Qwen-VL and the other families whose merged
            tokens are chosen among: 0.5; there a number is a cap, and small images keep all they have.
        method: how they are chosen (default: ``"visionzip"``): a name of :data:`visionzip.methods.METHODS`. All but
            VisionZip take ``keep``.
        layer: encoder layer to score (default: -2; models of transformers: their config's ``vision_feature_layer``).
        merge: ``"released"`` (default) or ``"average"``.
        seed: of methods that draw at random (default: 0).
        positions: ``"consecutive"`` or ``"original"`` (default: the method's own).
        size_bias: whether a kept token's attention grows with the patches it stands for (default: the method's own).
        max_tokens: the most tokens of an image, tile or frame where ``keep`` is a share (default: no limit).
        min_tokens: the least, as far as it has so many (default: 1).
        video_keep: tokens of a whole video or their share, chosen among all its frames at once (default: each frame is
            chosen from alone).
            All of these are explained in :class:`VisionZipConfig`. With none of them, the setting stored in
            ``model.config.visionzip`` is applied, if there is one.

    Returns:
        The same object.

    Raises:
        TypeError: the model is of no supported family (the message lists them), or a count is not an integer.
        ValueError: a number is outside its limits, the encoder has no such layer, the method is unknown or does not fit
            the model, or the model has no vision tower.

    Warns:
        UserWarning: the budget is the encoder's whole sequence or more, so nothing is compressed.
    """
    target = unwrap(model)
    integration = find_integration(target)
    if keep is not None and (dominant, contextual) != (None, None):
        raise ValueError(
            f"keep={keep} was given with dominant={dominant}, contextual={contextual}: give one or the other"
        )
    if type(keep) is int and keep > 0 and method in (None, "visionzip"):
        (dominant, contextual), keep = split(keep), None
    setting = {"dominant": dominant, "contextual": contextual, "keep": keep, "method": method}
    setting |= {"layer": layer, "merge": merge, "seed": seed, "positions": positions, "size_bias": size_bias}
    setting |= {"max_tokens": max_tokens, "min_tokens": min_tokens, "video_keep": video_keep}
    given = {name: value for name, value in setting.items() if value is not None}
    if given.keys() & {"dominant", "contextual"}:
        given["keep"] = None  # of a family whose default is a share
    stored = getattr(getattr(target, "config", None), "visionzip", None)
    if stored and not given:
        config = VisionZipConfig.from_dict(stored)
    else:
        config = dataclasses.replace(integration.default(target), **given)
    integration.attach(target, config)
    return model


def unzip(model: Model) -> Model:
    """Undo :func:`visionzip`: the model's outputs are bit-identical to those before it.

    Args:
        model: a model of a supported family, zipped or not.

    Returns:
        The same object.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: the model has no vision tower.
    """
    target = unwrap(model)
    find_integration(target).detach(target)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper or one of ``torch.compile``; any other as it is."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model

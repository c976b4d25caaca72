"""Attach VisionZip to a model of transformers, and remove it; ``huggingface.py`` describes what is attached."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import transformers
from torch import nn

from visionzip.config import VisionZipConfig
from visionzip.integrations import calls, generation, saving
from visionzip.integrations.encoders import Encoder
from visionzip.integrations.huggingface import TESTED, Family, Zipped
from visionzip.integrations.towers.base import TowerFamily
from visionzip.language.positions import check_positions
from visionzip.language.pruning import refuse_size_bias
from visionzip.language.size_bias import attach_size_bias, check_attention
from visionzip.methods import has_size_bias, positions_of


def attach(family: Family, model: nn.Module, config: VisionZipConfig) -> None:
    """Switch compression on, or change its setting, and store the setting in ``model.config.visionzip``.

    Raises:
        TypeError: the model lacks a needed attribute: its version is another, or its encoder cannot be read.
        ValueError: the encoder has no such layer, the projector takes several layers, or the setting does not fit.

    Warns:
        UserWarning: the version of transformers is untested, the budget compresses nothing, or the projector was not
            trained on the layer.
    """
    if not transformers.__version__.startswith(f"{TESTED}."):
        warnings.warn(
            f"VisionZip was tested with transformers {TESTED}.x, this is {transformers.__version__}: check that the "
            "answers are as you expect",
            stacklevel=4,
        )
    family.check(model, config)
    if positions_of(config) == "original" and not family.rotary:
        check_positions(family.language_model(model).config)
    if has_size_bias(config):
        check_attention(family.language_model(model).config)
        refuse_size_bias(model)
    detach(family, model)
    zipped = Zipped(family, config)
    for module, hook in ((model, calls.before_model), (model.model, calls.before_base)):
        # Our hook is the first: other hooks there (FastV's) count the shortened prompts.
        handle = module.register_forward_pre_hook(functools.partial(hook, zipped), with_kwargs=True, prepend=True)
        zipped.handles.append(handle)
    if has_size_bias(config):
        zipped.handles.append(attach_size_bias(family.language_model(model)))
    # Partials and not bound methods: unpickling a model would look those up by name on its class.
    for name in family.modalities:
        features = functools.partial(calls.features, zipped, model.model, name)
        _hang(zipped, model.model, f"get_{name}_features", features)
    _hang(zipped, model, "generate", functools.partial(generation.generate, model))
    if isinstance(family, TowerFamily):
        _hang(zipped, model, "save_pretrained", functools.partial(saving.save_pretrained, model, family.towers))
    _hang(zipped, model, "_get_logits_processor", functools.partial(generation.logits_processors, model))
    model._visionzip = zipped
    model.config.visionzip = config.to_dict()


def detach(family: Family, model: nn.Module) -> None:
    """Remove everything that is attached, and the stored setting."""
    zipped = vars(model).pop("_visionzip", None)
    if zipped is not None:
        for handle in zipped.handles:
            handle.remove()
        for module, name, own in zipped.replaced:
            vars(module).pop(name, None)
            if own is not None:
                setattr(module, name, own)
    vars(model.config).pop("visionzip", None)


def _hang(zipped: Zipped, module: nn.Module, name: str, function: Any) -> None:
    """Override a method on one object, and note what the user had there, so that it can be put back."""
    zipped.replaced.append((module, name, vars(module).get(name)))
    setattr(module, name, function)


def encoders(family: Family, model: nn.Module) -> dict[str, Encoder]:
    """Return the encoders of the model's images and videos."""
    return family.encoders(model)


def default_config(family: Family, model: nn.Module) -> VisionZipConfig:
    """Return the setting of the family if the user gives none."""
    return family.default_config(model)

"""Attaches VisionZip to a model of transformers, and takes it off; what it attaches is in ``huggingface.py``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from visionzip.config import VisionZipConfig
from visionzip.encoder import has_cls_token, layers_needed, side_length
from visionzip.integrations import generation
from visionzip.integrations.encoders import Encoder
from visionzip.integrations.huggingface import (
    NO_IDS,
    Family,
    Zipped,
    cached_length,
    check_pixels,
    check_values,
    has_pixels,
    held_by,
    hold,
    mask_misfit,
    pad_token,
    pixel_names,
    renamed,
    sequence_length,
    visuals,
)
from visionzip.integrations.placeholders import Visual, find_runs, shorten
from visionzip.methods import check_setting, uncompressed

TESTED = "5.23"  # of transformers; other versions warn


def attach(family: Family, model: nn.Module, config: VisionZipConfig) -> None:
    """Turn compression on, or configure it anew, and store the setting in ``model.config.visionzip``.

    Raises:
        TypeError: the model lacks an attribute that is needed: it is another version's, or its encoder is neither CLIP
            nor SigLIP.
        ValueError: the encoder has no such layer, or the projector takes several layers.

    Warns:
        UserWarning: of an untested version of transformers, of a budget that compresses nothing, and of a layer on
            which the projector was not trained.
    """
    _check_model(family, model, config)
    for name in family.towers:
        check_setting(config, model, side_length(getattr(model.model, name)), family.tiles)
    _warn(family, model, config)
    detach(family, model)
    zipped = Zipped(family, config)
    hook = functools.partial(_shorten_arguments, zipped)
    for module in (model, model.model):
        zipped.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    # Partials, not bound methods: these would be looked up by name, on the class, when a model is unpickled.
    for name, modality in family.modalities.items():
        _hang(zipped, model.model, f"get_{name}_features", functools.partial(modality.features, model.model, config))
    _hang(zipped, model, "generate", functools.partial(generation.generate, model))
    _hang(zipped, model, "_get_logits_processor", functools.partial(generation.logits_processors, model))
    model._visionzip = zipped
    model.config.visionzip = config.to_dict()


def detach(family: Family, model: nn.Module) -> None:
    """Take everything off again; a model that is not zipped stays as it is, but for a stored setting."""
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
    """Put a function on an object, in the place of its class's or of one of the object's own."""
    zipped.replaced.append((module, name, vars(module).get(name)))
    setattr(module, name, function)


def encoders(family: Family, model: nn.Module) -> dict[str, Encoder]:
    """The base model's encoders: of images, and of videos unless their frames are pooled before tokens are chosen."""
    base, stored = model.model, getattr(model.config, "visionzip", None)
    setting = VisionZipConfig.from_dict(stored) if stored and hasattr(model, "_visionzip") else None
    names = {"image": family.towers[0]}
    if "video" in family.modalities and family.modalities["video"].pooled_patches is None:
        names["video"] = family.towers[-1]
    found = {}
    for name, attribute in names.items():
        tower = getattr(base, attribute)
        pixels = _as_images if name == "image" else _as_frames
        inputs = functools.partial(pixels, tower)
        layers = tower.config.num_hidden_layers
        found[name] = Encoder(tower, setting, base.multi_modal_projector, layers, inputs=inputs)
    return found


def _as_images(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    check_pixels(pixels, "images", tower, "B")
    return pixels, {}


def _as_frames(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    check_pixels(pixels, "images", tower, "B, frames")
    return pixels.flatten(0, 1), {}


def default_config(family: Family, model: nn.Module) -> VisionZipConfig:
    """The family's setting, with the encoder layer on whose output the model's projector was trained."""
    _check_attributes(model, ("config.vision_feature_layer",))
    layer = _feature_layer(model)
    return dataclasses.replace(family.default, layer=layer if layer < 0 else layer - 1)


def _feature_layer(model: nn.Module) -> int:
    """``config.vision_feature_layer``, an index into the hidden states: -2 is encoder layer -2, 1 is layer 0."""
    layers = model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    if len(layers) != 1 or layers[0] == 0:
        raise ValueError(
            f"the projector of this {type(model).__name__} takes the hidden states {layers} (vision_feature_layer): "
            "VisionZip compresses the output of one encoder layer"
        )
    return layers[0]


def _check_attributes(holder: Any, names: Iterable[str]) -> None:
    if missing := [name for name in names if not _has(holder, name)]:
        raise TypeError(
            f"{type(holder).__name__} of transformers {transformers.__version__} has no {', '.join(missing)}: "
            f"VisionZip was tested with {TESTED}.x"
        )


def _has(holder: Any, name: str) -> bool:
    """``hasattr`` with dotted names."""
    try:
        attrgetter(name)(holder)
    except AttributeError:
        return False
    return True


def _check_model(family: Family, model: nn.Module, config: VisionZipConfig) -> None:
    _check_attributes(model, ("model", "config", "generate", "generation_config"))
    methods = [f"get_{name}_features" for name in family.modalities]
    _check_attributes(model.model, (*family.towers, *methods, "multi_modal_projector", "language_model", *family.needs))
    tokens = [f"{name}_token_id" for name in family.modalities]
    _check_attributes(model.config, (*tokens, "vision_feature_layer", "vision_feature_select_strategy"))
    taken = [*pixel_names(family), "mm_encoder_outputs"]
    if missing := [name for name in taken if name not in inspect.signature(type(model).forward).parameters]:
        raise TypeError(f"{type(model).__name__}.forward of transformers {transformers.__version__} takes no {missing}")
    _feature_layer(model)
    for name in family.towers:
        _check_encoder(getattr(model.model, name), config)


def _check_encoder(tower: nn.Module, config: VisionZipConfig) -> None:
    def check(holder: Any, *names: str) -> Any:
        if missing := [name for name in names if not hasattr(holder, name)]:
            raise TypeError(
                f"VisionZip reads CLIP and SigLIP encoders: the vision tower {type(tower).__name__} of transformers "
                f"{transformers.__version__} is built differently ({type(holder).__name__} has no {', '.join(missing)})"
            )
        return getattr(holder, names[0])

    check(check(tower, "embeddings", "encoder", "config"), "patch_embedding")
    check(tower.config, "image_size", "patch_size", "num_hidden_layers")
    layers = check(tower.encoder, "layers")
    attention = check(layers[layers_needed(tower, config.layer) - 1], "self_attn")
    check(attention, "q_proj", "k_proj", "num_heads", "scale")


def _warn(family: Family, model: nn.Module, config: VisionZipConfig) -> None:
    if not transformers.__version__.startswith(f"{TESTED}."):
        warnings.warn(
            f"VisionZip was tested with transformers {TESTED}.x, this is {transformers.__version__}: check that the "
            "answers are as you expect",
            stacklevel=5,
        )
    for name in family.towers:
        tower = getattr(model.model, name)
        if wide := uncompressed(config, side_length(tower) ** 2, has_cls_token(tower)):
            warnings.warn(
                f"{wide}, but the vision tower has {sequence_length(tower)}: nothing will be compressed. Use smaller "
                "budgets.",
                stacklevel=5,
            )
        feature_layer = _feature_layer(model)
        trained = feature_layer % (len(tower.encoder.layers) + 1)
        if layers_needed(tower, config.layer) != trained:
            warnings.warn(
                f"VisionZip reads encoder layer {config.layer}, but this model was trained on the hidden states of "
                f"layer {feature_layer} (vision_feature_layer): expect poor answers unless the projector is tuned.",
                stacklevel=5,
            )
    for name, modality in family.modalities.items():
        patches = modality.pooled_patches(model.model) if modality.pooled_patches else None
        cls_token = has_cls_token(getattr(model.model, family.towers[-1]))
        if patches is not None and (wide := uncompressed(config, patches, cls_token)):
            warnings.warn(
                f"{wide}, but this model pools a frame to {patches + cls_token}: no {name} will be compressed. Use "
                f"smaller budgets for {name}s.",
                stacklevel=5,
            )


def _shorten_arguments(zipped: Zipped, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the model and of its base model."""
    given = dict(zip(_parameters(type(module)), args, strict=False)) | kwargs if args else kwargs
    if has_pixels(zipped.family, given):
        return (), _shortened(zipped, module, renamed(zipped.family, given))
    if not torch.compiler.is_compiling():
        _check_text(zipped, module, given)
    return None  # text, or a step of decoding


def _check_text(zipped: Zipped, module: nn.Module, given: Mapping[str, Any]) -> None:
    """Check a forward without pixels; ``generate`` has checked its own.

    Raises:
        ValueError: a prompt has placeholders but no pixels, or the mask is one of a prompt that was not shortened.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None or given.get("mm_encoder_outputs") is not None:
        return
    on_device = getattr(given.get("past_key_values"), "is_compileable", False)
    if on_device and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return  # a step of generate: not worth a transfer of the cache's length
    held_by(given)  # corrects it before the cache grows again
    if cached_length(given) == 0:
        visuals(zipped, getattr(module, "model", module), given)
    _check_mask(given)


@torch.compiler.disable  # reads the ids
def _shortened(zipped: Zipped, module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    if given.get("input_ids") is None:
        raise ValueError(NO_IDS)
    _refuse_positions(given)
    _check_mask(given)
    hold(given.get("past_key_values"), None)
    base = getattr(module, "model", module)
    found = visuals(zipped, base, given)
    # The model has shortened what its base model is called with.
    if base is module and all(_count(given["input_ids"], v) == sum(run.short for run in v.runs) for v in found):
        return given
    edits = find_runs(given["input_ids"], found)
    check_values(zipped.family, given)
    return given | shorten(given, edits, pad_token(module)).arguments


def _check_mask(given: Mapping[str, Any]) -> None:
    # A wrong length is harmless while nothing is masked, so the values are looked at last.
    if (misfit := mask_misfit(given)) and not given["attention_mask"].all():
        raise ValueError(misfit)


def _refuse_positions(given: Mapping[str, Any]) -> None:
    """Refuse arguments that point at tokens of the prompts as they were.

    Raises:
        ValueError: there is one.
    """
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep has positions in the prompts, which are shorter in a zipped model: give a number, which "
            "counts from the end"
        )
    if names := [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if given.get(name) is not None]:
        raise ValueError(
            f"{' and '.join(names)} count tokens of the prompts, which are shorter in a zipped model: leave them out; "
            "position_ids that start anew tell packed prompts apart"
        )


def _count(input_ids: Tensor, visual: Visual) -> int:
    return int((input_ids == visual.token_id).sum())


@functools.cache
def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]

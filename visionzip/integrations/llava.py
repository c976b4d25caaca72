"""Attach VisionZip to the LLaVAs of this repository, whose vision towers have a compression stage that is configured.

Video-LLaVA has two towers, which get the same budget, per image and per frame of a video. Mini-Gemini's second tower, a
ConvNeXt, has no attention and stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module

from torch import Tensor, nn

from visionzip.config import VisionZipConfig
from visionzip.integrations.encoders import Encoder
from visionzip.methods import check_setting, has_size_bias, positions_of, uncompressed


def attach(model: nn.Module, config: VisionZipConfig) -> None:
    """Set the towers' compression stage and store the setting.

    Raises:
        ValueError: the model has no vision tower, its encoder has no such layer, the method does not fit it, or its
            language model cannot have the setting's positions or size bias.
    """
    towers = _towers(model)
    if model not in towers:
        _check_language(model, config)
    aspect = str(getattr(getattr(model, "config", None), "image_aspect_ratio", None))
    lays_out = aspect.startswith("anyres") or hasattr(model, "get_vision_tower_aux")
    for tower in towers:
        check_setting(config, model, tower.num_patches_per_side, lays_out)
        _warn(tower, config)
    for tower in towers:
        tower.visionzip = config
    if model not in towers:
        model.config.visionzip = config.to_dict()


def _check_language(model: nn.Module, config: VisionZipConfig) -> None:
    """Check that the language model can have the setting's positions and size bias."""
    if positions_of(config) == "original":  # imported late, as these modules import this one
        import_module("visionzip.language.positions").check_positions(model.config)
    if not has_size_bias(config):
        return
    import_module("visionzip.language.size_bias").check_attention(model.config)
    import_module("visionzip.language.pruning").refuse_size_bias(model)


def _warn(tower: nn.Module, config: VisionZipConfig) -> None:
    """Warn if nothing is compressed, or if the projector was trained on another layer."""
    if wide := uncompressed(config, tower.num_patches_per_side**2, tower.cls_token):
        warnings.warn(
            f"{wide}, but the vision tower has {tower.sequence_length}: nothing will be compressed. Use smaller "
            "budgets.",
            stacklevel=4,
        )
    if tower.visionzip_layers(config) != tower.feature_layers(tower.select_layer):
        warnings.warn(
            f"VisionZip reads encoder layer {config.layer}, but this model was trained on the hidden states of layer "
            f"{tower.select_layer} (mm_vision_select_layer): expect poor answers unless the projector is tuned.",
            stacklevel=4,
        )


def detach(model: nn.Module) -> None:
    """Clear the towers' compression stage and remove the setting."""
    towers = _towers(model)
    for tower in towers:
        tower.visionzip = None
    if model not in towers and hasattr(model.config, "visionzip"):
        del model.config.visionzip


def _towers(model: nn.Module) -> list[nn.Module]:
    """List all towers with a compression stage; for a tower, this is the tower itself."""
    first = vision_tower(model)
    return [first] if first is model else [tower for tower in model.towers().values() if hasattr(tower, "visionzip")]


def vision_tower(model: nn.Module) -> nn.Module:
    """Return the model's vision tower, or the model itself if it is a tower.

    Raises:
        ValueError: the model has no vision tower.
    """
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else model
    if tower is None:
        raise ValueError(
            f"this {type(model).__name__} has no vision tower to compress: its config names no mm_vision_tower"
        )
    return tower


def encoders(model: nn.Module) -> dict[str, Encoder]:
    """Return the encoders of the image tower and, if there is one, the video tower; a tower is its own image tower.

    Raises:
        ValueError: the model has no vision tower.
    """
    towers = {"image": vision_tower(model)}
    if hasattr(model, "get_video_tower"):
        towers["video"] = model.get_video_tower()
    project = getattr(model, "_project", None) or getattr(model, "mm_projector", None)
    return {name: _encoder(tower, project) for name, tower in towers.items()}


def _encoder(tower: nn.Module, project: Callable[[Tensor], Tensor] | None) -> Encoder:
    untrained = [int(key.split(".")[2]) for key in tower.untrained if key.startswith("encoder.layers.")]
    trained = min(untrained, default=tower.config.num_hidden_layers)
    return Encoder(
        tower.encoder, tower.visionzip, project, trained, lambda: tower.image_processor, tower.encoder_inputs
    )

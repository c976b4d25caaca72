"""In-tree LLaVAs: their vision towers have the compression stage built in, so attaching is setting its configuration.

Video-LLaVA has two towers, which get the same budget: per image, and per frame of a video. Mini-Gemini's second one, a
ConvNeXt, has no attention to go by.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor, nn

from visionzip.config import VisionZipConfig
from visionzip.integrations.encoders import Encoder
from visionzip.methods import check_setting, uncompressed


def attach(model: nn.Module, config: VisionZipConfig) -> None:
    """Set the towers' compression stage and store the setting.

    Raises:
        ValueError: the model has no vision tower, its encoder has no such layer, or the method does not fit it.
    """
    towers = _towers(model)
    aspect = str(getattr(getattr(model, "config", None), "image_aspect_ratio", None))
    lays_out = aspect.startswith("anyres") or hasattr(model, "get_vision_tower_aux")
    for tower in towers:
        check_setting(config, model, tower.num_patches_per_side, lays_out)
        _warn(tower, config)
    for tower in towers:
        tower.visionzip = config
    if model not in towers:
        model.config.visionzip = config.to_dict()


def _warn(tower: nn.Module, config: VisionZipConfig) -> None:
    """Warn where nothing is compressed, or the projector does not know what it gets."""
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
    """All towers with a compression stage; the model itself if it is one."""
    first = vision_tower(model)
    return [first] if first is model else [tower for tower in model.towers().values() if hasattr(tower, "visionzip")]


def vision_tower(model: nn.Module) -> nn.Module:
    """The model's vision tower, or the model itself if it is one.

    Raises:
        ValueError: the model has none.
    """
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else model
    if tower is None:
        raise ValueError(
            f"this {type(model).__name__} has no vision tower to compress: its config names no mm_vision_tower"
        )
    return tower


def encoders(model: nn.Module) -> dict[str, Encoder]:
    """The image tower and, where the model has one, the video tower; the model itself if it is a tower.

    Raises:
        ValueError: the model has none.
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

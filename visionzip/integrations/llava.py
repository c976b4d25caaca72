"""In-tree LLaVA: its vision tower has the compression stage built in, so attaching is setting its configuration."""

from __future__ import annotations

import warnings

from torch import nn

from visionzip.config import VisionZipConfig


def attach(model: nn.Module, config: VisionZipConfig) -> None:
    """Set the tower's compression stage and store the setting.

    Raises:
        ValueError: the model has no vision tower, or its encoder has no such layer.
    """
    tower = vision_tower(model)
    if config.num_tokens >= tower.sequence_length:
        warnings.warn(
            f"dominant={config.dominant} + contextual={config.contextual} is {config.num_tokens} tokens, but the "
            f"vision tower has {tower.sequence_length}: nothing will be compressed. Use smaller budgets.",
            stacklevel=3,
        )
    if tower.visionzip_layers(config) != tower.feature_layers(tower.select_layer):
        warnings.warn(
            f"VisionZip reads encoder layer {config.layer}, but this model was trained on the hidden states of layer "
            f"{tower.select_layer} (mm_vision_select_layer): expect poor answers unless the projector is tuned.",
            stacklevel=3,
        )
    tower.visionzip = config
    if tower is not model:
        model.config.visionzip = config.to_dict()


def detach(model: nn.Module) -> None:
    """Clear the tower's compression stage and remove the setting."""
    tower = vision_tower(model)
    tower.visionzip = None
    if tower is not model and hasattr(model.config, "visionzip"):
        del model.config.visionzip


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

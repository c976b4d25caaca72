"""Chooses the tower's class by the encoder's config."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from llava.model.multimodal_encoder.vision_tower import VisionTower, resolve_tower_path

_TOWERS: dict[str, type[VisionTower]] = {"clip": CLIPVisionTower, "siglip": SigLipVisionTower}


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> VisionTower:
    """The tower that a model's config asks for.

    Args:
        vision_tower_cfg: config with ``mm_vision_tower``: a hub name or a folder.
        **kwargs: passed to the tower (``delay_load``).

    Raises:
        OSError: the tower's config can neither be read nor fetched.
        ValueError: the encoder is neither CLIP nor SigLIP.
    """
    name = vision_tower_cfg.mm_vision_tower
    stored = getattr(vision_tower_cfg, "mm_vision_config", None)
    if stored is None:
        try:
            stored, _ = PretrainedConfig.get_config_dict(resolve_tower_path(name, vision_tower_cfg))
        except OSError as error:
            raise OSError(
                f"cannot read the config of the vision tower mm_vision_tower={name!r}: it is neither a folder (also "
                "not inside the checkpoint) nor to be had from the hub. Download it and set mm_vision_tower in the "
                f"checkpoint's config.json to its folder. ({error})"
            ) from error
    kind = stored.get("model_type", "").split("_")[0]
    if kind not in _TOWERS:
        raise ValueError(
            f"the vision tower {name!r} is of type {stored.get('model_type')!r}: supported are {sorted(_TOWERS)}"
        )
    return _TOWERS[kind](name, args=vision_tower_cfg, **kwargs)

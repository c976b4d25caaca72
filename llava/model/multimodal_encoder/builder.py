"""Chooses the tower's class by the encoder's config."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.languagebind import LanguageBindImageTower, LanguageBindVideoTower
from llava.model.multimodal_encoder.openclip_encoder import OpenCLIPVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from llava.model.multimodal_encoder.tower_files import resolve_tower_path
from llava.model.multimodal_encoder.vision_tower import VisionTower

_TOWERS: dict[str, type[VisionTower]] = {"clip": CLIPVisionTower, "siglip": SigLipVisionTower}


def build_towers(config: Any, **kwargs: Any) -> dict[str, nn.Module]:
    """All towers that a model's config asks for, by the attribute that holds each; that of images comes first.

    Args:
        config: with ``mm_vision_tower`` (Mini-Gemini's with ``mm_vision_tower_aux`` besides), or as Video-LLaVA's with
            ``mm_image_tower`` and ``mm_video_tower``.
        **kwargs: passed to the towers (``delay_load``).

    Raises:
        OSError: a tower's config can neither be read nor fetched.
        ValueError: an encoder is of another kind, or Video-LLaVA's image tower is missing.
    """
    if getattr(config, "mm_video_tower", None):
        if not getattr(config, "mm_image_tower", None):
            raise ValueError(
                f"mm_video_tower={config.mm_video_tower!r} comes without an mm_image_tower: models for videos only are "
                "not supported; the released ones have 'LanguageBind/LanguageBind_Image'"
            )
        for field, kind in (("mm_image_tower", LanguageBindImageTower), ("mm_video_tower", LanguageBindVideoTower)):
            _encoder_config(config, field, kind.config_key)  # says which cannot be read
        return {
            "image_tower": LanguageBindImageTower(config.mm_image_tower, config, **kwargs),
            "video_tower": LanguageBindVideoTower(config.mm_video_tower, config, **kwargs),
        }
    if not getattr(config, "mm_vision_tower", None):
        return {}
    towers: dict[str, nn.Module] = {"vision_tower": build_vision_tower(config, **kwargs)}
    if getattr(config, "mm_vision_tower_aux", None):
        towers["vision_tower_aux"] = OpenCLIPVisionTower(config.mm_vision_tower_aux, config, **kwargs)
    return towers


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> VisionTower:
    """The tower that a model's config asks for.

    Args:
        vision_tower_cfg: config with ``mm_vision_tower``: a hub name or a folder.
        **kwargs: passed to the tower (``delay_load``).

    Raises:
        OSError: the tower's config can neither be read nor fetched.
        ValueError: the encoder is neither CLIP nor SigLIP.
    """
    name, stored = vision_tower_cfg.mm_vision_tower, _encoder_config(vision_tower_cfg)
    kind = stored.get("model_type", "").split("_")[0]
    if kind not in _TOWERS:
        raise ValueError(
            f"the vision tower {name!r} is of type {stored.get('model_type')!r}: supported are {sorted(_TOWERS)}"
        )
    return _TOWERS[kind](name, args=vision_tower_cfg, **kwargs)


def _encoder_config(
    config: Any, field: str = "mm_vision_tower", config_key: str = VisionTower.config_key
) -> dict[str, Any]:
    """The config of the encoder that a field of a model's config names: as stored in the model's, else its own."""
    name, stored = getattr(config, field), getattr(config, config_key, None)
    if stored is not None:
        return stored
    try:
        return PretrainedConfig.get_config_dict(resolve_tower_path(name, config))[0]
    except OSError as error:
        raise OSError(
            f"cannot read the config of the vision tower {field}={name!r}: it is neither a folder (also not inside the "
            f"checkpoint) nor to be had from the hub. Download it and set {field} in the checkpoint's config.json to "
            f"its folder. ({' '.join(str(error).split())})"
        ) from error

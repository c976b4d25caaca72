"""Where a vision tower is, and its image processor: in a folder, inside the model's checkpoint, or on the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llava.model.checkpoints.files import find_file

logger = logging.getLogger(__name__)

_ON_HUB = {  # where the towers that Mini-Gemini's config.json name are
    "model_zoo/OpenAI/clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup": (
        "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    ),
}


def resolve_tower_path(name: str, args: Any) -> str:
    """Where a tower is: the folder ``name``, that inside the model's checkpoint, or ``name`` on the hub.

    Mini-Gemini's checkpoints name folders of its repository, which hold models of the hub.
    """
    inside = Path(getattr(args, "_name_or_path", "") or ".") / name
    if Path(name).is_dir():
        return name
    return str(inside) if inside.is_dir() else _ON_HUB.get(name, name)


def read_image_processor(tower: Any, checkpoint: str) -> Any:
    """A tower's image processor: that in ``checkpoint`` (folder or hub name), else the tower's own, else the standard.

    Raises:
        OSError: neither has one, and the tower is no folder.
    """
    folder = tower.vision_tower_name
    for source in filter(None, (checkpoint, folder)):
        if find_file(source, "preprocessor_config.json"):
            return tower.processor_class.from_pretrained(source)
    if Path(folder).is_dir():
        logger.warning(
            "%s has no preprocessor_config.json: using the standard processor of %s at %d pixels",
            folder,
            tower.model_class.__name__,
            tower.config.image_size,
        )
        return tower.default_processor()
    raise OSError(
        f"there is no image processor: neither the checkpoint {checkpoint!r} nor the vision tower {folder!r} has a "
        "preprocessor_config.json that can be read. Copy the vision tower's into the checkpoint's folder"
    )

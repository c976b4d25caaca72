"""Model families that VisionZip can be attached to: one file each, found by the name of the model's class.

By name, so that no family has to be imported before it is used (and ``visionzip`` never imports ``llava``). To add a
family, write a module with ``attach(model, config)``, ``detach(model)`` and ``vision_tower(model)`` and register its
classes here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from visionzip.config import VisionZipConfig
from visionzip.integrations import llava


@dataclass(frozen=True)
class Integration:
    """How one model family is zipped.

    Attributes:
        family: its name, for messages.
        attach: turns compression on, or re-configures it, and stores the setting in the model's config.
        detach: turns it off and removes the setting.
        vision_tower: the part that compresses, for :mod:`visionzip.visualize` to look into.
        defaults: settings that differ from :class:`VisionZipConfig`'s where the user gives none.
    """

    family: str
    attach: Callable[[nn.Module, VisionZipConfig], None]
    detach: Callable[[nn.Module], None]
    vision_tower: Callable[[nn.Module], Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAVA = Integration("LLaVA-1.5, LLaVA-NeXT and Mini-Gemini (llava)", llava.attach, llava.detach, llava.vision_tower)
# Per frame: 8 x 17 = 136 of a video as in the paper's Table 3, which does not say how they are split. CLS is of the 15.
_VIDEO_LLAVA = Integration(
    "Video-LLaVA (llava)", llava.attach, llava.detach, llava.vision_tower, {"dominant": 15, "contextual": 2}
)

REGISTRY: dict[str, Integration] = {
    "llava.model.language_model.video_llava.VideoLlavaLlamaForCausalLM": _VIDEO_LLAVA,
    "llava.model.llava_arch.LlavaMetaForCausalLM": _LLAVA,
    "llava.model.multimodal_encoder.vision_tower.VisionTower": _LLAVA,
}


def find_integration(model: nn.Module) -> Integration:
    """The integration of a model's class or of the nearest of its base classes.

    Raises:
        TypeError: there is none; the message lists the supported classes.
    """
    for base in type(model).__mro__:
        if (name := f"{base.__module__}.{base.__qualname__}") in REGISTRY:
            return REGISTRY[name]
    supported = "; ".join(f"{name}: {integration.family}" for name, integration in REGISTRY.items())
    raise TypeError(
        f"VisionZip does not support {type(model).__name__}. Supported are these classes and what derives from them: "
        f"{supported}"
    )

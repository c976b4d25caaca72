"""Model families that VisionZip can be attached to: one file each, found by the name of the model's class.

By name, so that no family has to be imported before it is used (and ``visionzip`` never imports ``llava``). To add a
family of transformers, write a module with a :class:`~visionzip.integrations.huggingface.Family`; to add any other, one
with ``attach(model, config)``, ``detach(model)`` and ``encoders(model)``; and register its classes here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from visionzip.config import VisionZipConfig
from visionzip.integrations import llava
from visionzip.integrations.encoders import Encoder


@dataclass(frozen=True)
class Integration:
    """How one model family is zipped.

    Attributes:
        family: its name, for messages.
        attach: turns compression on, or re-configures it, and stores the setting in the model's config.
        detach: turns it off and removes the setting.
        encoders: what images go through, as ``"image"``, and where they have an encoder of their own, or one that
            chooses among all patches of a frame, videos as ``"video"``.
        default: a model's setting where the user gives none.
    """

    family: str
    attach: Callable[[nn.Module, VisionZipConfig], None]
    detach: Callable[[nn.Module], None]
    encoders: Callable[[nn.Module], dict[str, Encoder]]
    default: Callable[[nn.Module], VisionZipConfig] = lambda _model: VisionZipConfig()


def _of_transformers(module: str, name: str) -> Integration:
    def verb(function: str) -> Callable[..., Any]:
        def call(model: nn.Module, *args: Any) -> Any:
            # Not before it is used: what is behind takes seconds to import.
            family = import_module(f"{__name__}.{module}").FAMILY
            return getattr(import_module(f"{__name__}.attach"), function)(family, model, *args)

        return call

    return Integration(name, verb("attach"), verb("detach"), verb("encoders"), verb("default_config"))


_LLAVA = Integration("LLaVA-1.5, LLaVA-NeXT and Mini-Gemini (llava)", llava.attach, llava.detach, llava.encoders)
# Per frame: 8 x 17 = 136 of a video as in the paper's Table 3, which does not say how they are split. CLS is of the 15.
_VIDEO_LLAVA = Integration(
    "Video-LLaVA (llava)", llava.attach, llava.detach, llava.encoders, lambda _model: VisionZipConfig(15, 2)
)

REGISTRY: dict[str, Integration] = {
    "llava.model.language_model.video_llava.VideoLlavaLlamaForCausalLM": _VIDEO_LLAVA,
    "llava.model.llava_arch.LlavaMetaForCausalLM": _LLAVA,
    "llava.model.multimodal_encoder.vision_tower.VisionTower": _LLAVA,
    **{
        f"transformers.models.{cls}ForConditionalGeneration": _of_transformers(module, f"{name} (transformers)")
        for cls, module, name in (
            ("llava.modeling_llava.Llava", "hf_llava", "LLaVA-1.5"),
            ("llava_next.modeling_llava_next.LlavaNext", "hf_llava_next", "LLaVA-NeXT"),
            ("llava_onevision.modeling_llava_onevision.LlavaOnevision", "hf_llava_onevision", "LLaVA-OneVision"),
            ("llava_next_video.modeling_llava_next_video.LlavaNextVideo", "hf_llava_next_video", "LLaVA-NeXT-Video"),
            ("video_llava.modeling_video_llava.VideoLlava", "hf_video_llava", "Video-LLaVA"),
        )
    },
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

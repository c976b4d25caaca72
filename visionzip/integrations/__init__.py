"""The model families that VisionZip can be attached to, registered by the names of their classes.

Names are registered, and not classes, so that no family is imported before it is used, and ``visionzip`` never imports
``llava``. Classes of transformers that are not registered are handled by :mod:`visionzip.integrations.seam.any_class`.

To add a family of transformers, write a :class:`~visionzip.integrations.huggingface.Family`. To add any other family,
write a module with ``attach(model, config)``, ``detach(model)`` and ``encoders(model)``. Register its classes here,
or from outside by :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from visionzip.config import VisionZipConfig
from visionzip.integrations import llava
from visionzip.integrations.encoders import Encoder

if TYPE_CHECKING:
    from visionzip.integrations.huggingface import Family


@dataclass(frozen=True)
class Integration:
    """How one model family is zipped.

    Attributes:
        family: the family's name, for messages.
        attach: switches compression on, or changes its setting, and stores the setting in the model's config.
        detach: switches compression off and removes the setting.
        encoders: returns the encoder of images as ``"image"``, and that of videos as ``"video"`` if they have one of
            their own, or one that chooses among all patches of a frame.
        default: returns a model's setting if the user gives none.
        generating: returns the object whose ``generate`` and ``forward`` run: the model itself, or one inside it.
    """

    family: str
    attach: Callable[[nn.Module, VisionZipConfig], None]
    detach: Callable[[nn.Module], None]
    encoders: Callable[[nn.Module], dict[str, Encoder]]
    default: Callable[[nn.Module], VisionZipConfig] = lambda _model: VisionZipConfig()
    generating: Callable[[nn.Module], nn.Module] = lambda model: model


_TRANSFORMERS = {
    f"transformers.models.{cls}ForConditionalGeneration": (place, f"{name} (transformers)")
    for cls, place, name in (
        ("llava.modeling_llava.Llava", "towers.llava.LLAVA", "LLaVA-1.5"),
        ("llava_next.modeling_llava_next.LlavaNext", "towers.llava_next.LLAVA_NEXT", "LLaVA-NeXT"),
        (
            "llava_onevision.modeling_llava_onevision.LlavaOnevision",
            "towers.llava_onevision.LLAVA_ONEVISION",
            "LLaVA-OneVision",
        ),
        (
            "llava_next_video.modeling_llava_next_video.LlavaNextVideo",
            "towers.llava_next.LLAVA_NEXT_VIDEO",
            "LLaVA-NeXT-Video",
        ),
        ("video_llava.modeling_video_llava.VideoLlava", "towers.llava.VIDEO_LLAVA", "Video-LLaVA"),
        ("qwen2_vl.modeling_qwen2_vl.Qwen2VL", "seam.families.QWEN_VL", "Qwen2-VL"),
        ("qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VL", "seam.families.QWEN_VL", "Qwen2.5-VL"),
        ("qwen3_vl.modeling_qwen3_vl.Qwen3VL", "seam.families.QWEN3_VL", "Qwen3-VL"),
        ("qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoe", "seam.families.QWEN3_VL", "Qwen3-VL (MoE)"),
        ("qwen3_5.modeling_qwen3_5.Qwen3_5", "seam.families.QWEN3_VL", "Qwen3.5"),
        ("qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5Moe", "seam.families.QWEN3_VL", "Qwen3.5 (MoE)"),
        ("glm4v.modeling_glm4v.Glm4v", "seam.families.GLM4V", "GLM-4V"),
        ("glm4v_moe.modeling_glm4v_moe.Glm4vMoe", "seam.families.GLM4V", "GLM-4.5V"),
        ("glm46v.modeling_glm46v.Glm46V", "seam.families.GLM4V", "GLM-4.6V"),
        ("internvl.modeling_internvl.InternVL", "seam.families.INTERNVL", "InternVL"),
        ("gemma3.modeling_gemma3.Gemma3", "seam.families.GEMMA3", "Gemma 3"),
        ("gemma4.modeling_gemma4.Gemma4", "seam.gemma4.GEMMA4", "Gemma 4"),
        ("idefics3.modeling_idefics3.Idefics3", "seam.families.IDEFICS3", "Idefics3"),
        ("mistral3.modeling_mistral3.Mistral3", "seam.pixtral.PIXTRAL", "Mistral 3"),
        ("smolvlm.modeling_smolvlm.SmolVLM", "seam.families.IDEFICS3", "SmolVLM"),
    )
}


_BY_TOWER = {("towers.llava.LLAVA", "pixtral"): "seam.pixtral.PIXTRAL"}
"""Classes that come with several kinds of encoders: Pixtral-12B is a LLaVA."""


def family_of(model: nn.Module) -> Family:
    """Return the family of a model of transformers.

    Raises:
        TypeError: the model belongs to no family.
    """
    names = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    if (own := next((_REGISTERED[name] for name in names if name in _REGISTERED), None)) is not None:
        return own
    for base in type(model).__mro__:
        if (name := f"{base.__module__}.{base.__qualname__}") in _TRANSFORMERS:
            return _load(_TRANSFORMERS[name][0], model)
    if (family := _any_family(model)) is not None:
        return family
    raise TypeError(f"{type(model).__name__} is no model of transformers that VisionZip supports")


def _any_family(model: nn.Module) -> Family | None:
    """Return the family of a class of transformers that is not registered, if it can have one."""
    if not any(base.__module__.startswith("transformers.") for base in type(model).__mro__):
        return None
    return import_module(f"{__name__}.seam.any_class").any_family(model)


def _load(place: str, model: nn.Module) -> Family:
    encoder = str(getattr(getattr(model.config, "vision_config", None), "model_type", None))
    file, _, attribute = _BY_TOWER.get((place, encoder), place).rpartition(".")
    return getattr(import_module(f"{__name__}.{file}"), attribute)


def _of_transformers(load: Callable[[nn.Module], Family], name: str) -> Integration:
    def verb(function: str) -> Callable[..., Any]:
        def call(model: nn.Module, *args: Any) -> Any:
            # This import takes seconds, so it waits until a model is zipped.
            return getattr(import_module(f"{__name__}.attach"), function)(load(model), model, *args)

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
    **{key: _of_transformers(partial(_load, place), name) for key, (place, name) in _TRANSFORMERS.items()},
}


_REGISTERED: dict[str, Family] = {}


def register(model_class: type[nn.Module], family: Family, name: str) -> None:
    """Let ``visionzip(model)`` zip models of another class, built like those of transformers, while the process lives.

    Args:
        model_class: the class; classes that derive from it are zipped too.
        family: the family by which its models are zipped.
        name: the family's name, for messages.
    """
    key = f"{model_class.__module__}.{model_class.__qualname__}"
    _REGISTERED[key] = family
    REGISTRY[key] = _of_transformers(lambda *_model: family, name)


def find_integration(model: nn.Module) -> Integration:
    """Find the integration of a model's class, or of the nearest base class that has one.

    Raises:
        TypeError: there is none; the message lists the supported classes.
    """
    for base in type(model).__mro__:
        if (name := f"{base.__module__}.{base.__qualname__}") in REGISTRY:
            return REGISTRY[name]
    supported = ", ".join(f"{name.rpartition('.')[2]} ({integration.family})" for name, integration in REGISTRY.items())
    own = type(model).__name__
    whole = f"{own.removesuffix('Model')}ForConditionalGeneration"
    known = any(name.endswith(f".{whole}") for name in REGISTRY)
    if not known and (family := _any_family(model)) is not None:
        return _of_transformers(lambda _model: family, "any that takes mm_encoder_outputs (transformers)")
    hint = f" Give the whole {whole}, not its base model." if known else ""
    raise TypeError(
        f"VisionZip does not support {own}.{hint} Supported are these classes and what derives from them: {supported}; "
        "and with methods that read no attention, any class of transformers whose forward takes mm_encoder_outputs"
    )

"""LLaVA on a Mistral backbone."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(MistralConfig):
    """Mistral's config and LLaVA's fields (``mm_vision_tower``, ``mm_projector_type``, …)."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral with a vision tower."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    """The model that generates: see :class:`llava.model.llava_arch.LlavaMetaForCausalLM`."""

    config_class = LlavaMistralConfig
    backbone_class = LlavaMistralModel


AutoConfig.register("llava_mistral", LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)

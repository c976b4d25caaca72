"""Mini-Gemini on a Llama backbone."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.mini_gemini.mgm_arch import MGMMetaForCausalLM, MGMMetaModel


class MGMConfig(LlamaConfig):
    """Llama's config, LLaVA's fields, and Mini-Gemini's (``mm_vision_tower_aux``, ``image_size_aux``, …)."""

    model_type = "mgm"


class MGMLlamaModel(MGMMetaModel, LlamaModel):
    """Llama with two vision towers."""

    config_class = MGMConfig


class MGMLlamaForCausalLM(MGMMetaForCausalLM, LlamaForCausalLM):
    """The model that generates: see :class:`llava.model.mini_gemini.mgm_arch.MGMMetaForCausalLM`."""

    config_class = MGMConfig
    backbone_class = MGMLlamaModel


AutoConfig.register("mgm", MGMConfig)
AutoModelForCausalLM.register(MGMConfig, MGMLlamaForCausalLM)

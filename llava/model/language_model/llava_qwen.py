"""LLaVA on a Qwen2 backbone."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenConfig(Qwen2Config):
    """Qwen2's config and LLaVA's fields (``mm_vision_tower``, ``mm_projector_type``, …)."""

    model_type = "llava_qwen"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    """Qwen2 with a vision tower."""

    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    """The model that generates: see :class:`llava.model.llava_arch.LlavaMetaForCausalLM`."""

    config_class = LlavaQwenConfig
    backbone_class = LlavaQwenModel


AutoConfig.register("llava_qwen", LlavaQwenConfig)
AutoModelForCausalLM.register(LlavaQwenConfig, LlavaQwenForCausalLM)

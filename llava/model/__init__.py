"""The LLaVA models, by backbone."""

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.language_model.mgm_llama import MGMConfig, MGMLlamaForCausalLM
from llava.model.language_model.video_llava import VideoLlavaLlamaConfig, VideoLlavaLlamaForCausalLM

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaQwenConfig",
    "LlavaQwenForCausalLM",
    "MGMConfig",
    "MGMLlamaForCausalLM",
    "VideoLlavaLlamaConfig",
    "VideoLlavaLlamaForCausalLM",
]

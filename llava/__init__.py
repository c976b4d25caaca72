"""LLaVA-1.5 and LLaVA-NeXT on current libraries, with VisionZip's compression stage in the vision tower."""

from llava.model import LlavaLlamaForCausalLM

__all__ = ["LlavaLlamaForCausalLM"]

"""LLaVA-1.5 and LLaVA-NeXT on current libraries, with VisionZip's compression stage in the vision tower."""

from typing import Any

__all__ = ["LlavaLlamaForCausalLM"]


def __getattr__(name: str) -> Any:
    """Import the model when it is asked for: ``visionzip --help`` needs neither it nor torch."""
    if name == "LlavaLlamaForCausalLM":
        from llava.model import LlavaLlamaForCausalLM  # noqa: PLC0415

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

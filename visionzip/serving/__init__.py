"""Serve zipped models with vLLM: a plugin that vLLM finds by itself if this package is installed in its environment.

``vllm serve DIR`` serves a checkpoint with ``config.visionzip`` zipped. Any other checkpoint is zipped by
``--hf-overrides '{"visionzip": {"keep": 64}}'``, and ``'{"visionzip": null}'`` serves a zipped one uncompressed.
Without a setting, vLLM's models are unchanged. docs/serving.md says how to start a server, and what is supported.
"""

from __future__ import annotations

MODELS = {
    "LlavaForConditionalGeneration": "visionzip.serving.vllm_llava:ZippedLlava",
    "LlavaNextForConditionalGeneration": "visionzip.serving.vllm_llava:ZippedLlavaNext",
    "Qwen2VLForConditionalGeneration": "visionzip.serving.vllm_qwen:ZippedQwen2",
    "Qwen2_5_VLForConditionalGeneration": "visionzip.serving.vllm_qwen:ZippedQwen25",
    "Qwen3VLForConditionalGeneration": "visionzip.serving.vllm_qwen:ZippedQwen3",
}


def register() -> None:
    """Register our models in place of vLLM's own; vLLM calls this in each of its processes, sometimes twice.

    The models are registered by name, so that nothing large is imported before a model is built.
    """
    from vllm import ModelRegistry  # noqa: PLC0415 - vLLM is not always installed

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)

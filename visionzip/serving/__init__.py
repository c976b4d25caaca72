"""Serves zipped models with vLLM: a plugin that vLLM finds by itself once this package is installed beside it.

A checkpoint with ``config.visionzip`` is served zipped by plain ``vllm serve DIR``, any other with ``--hf-overrides
'{"visionzip": {"keep": 64}}'``, and neither by ``'{"visionzip": null}'``. Without a setting vLLM's models are as they
were. How to start a server, and what is supported: docs/serving.md.
"""

from __future__ import annotations

MODELS = {
    "LlavaForConditionalGeneration": "visionzip.serving.vllm:ZippedLlava",
    "LlavaNextForConditionalGeneration": "visionzip.serving.vllm:ZippedLlavaNext",
}


def register() -> None:
    """Register the models in the place of vLLM's own; vLLM calls this in each of its processes, maybe twice.

    By name, so that nothing large is imported before a model is built.
    """
    from vllm import ModelRegistry  # noqa: PLC0415 - only where vLLM is

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)

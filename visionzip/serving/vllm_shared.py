"""What the zipped models of all families share inside vLLM: where they read their setting, and how caches know it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import transformers
import vllm
from vllm.config import VllmConfig
from vllm.multimodal.processing import BaseProcessingInfo

from visionzip.config import VisionZipConfig
from visionzip.serving.setting import cache_key, check_parallel, served_setting, warn_untested


class ZippedInfo(BaseProcessingInfo):
    """Knows the model's setting."""

    @cached_property
    def setting(self) -> VisionZipConfig | None:
        """The model's setting, or None."""
        return served_setting(self.get_hf_config())


class KeyedProcessor:
    """Adds the setting to the hash under which an image's tokens are cached."""

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)
        if (setting := self.info.setting) is None:
            return hashes
        return {modality: [f"{each}-{cache_key(setting)}" for each in all_] for modality, all_ in hashes.items()}


class ZippedModel:
    """Reads the setting as the model is built, and checks that the engine can run it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.setting = served_setting(self.config)
        if self.setting is None:
            return
        warn_untested(vllm=vllm.__version__, transformers=transformers.__version__)
        parallel = vllm_config.parallel_config.tensor_parallel_size
        check_parallel(self.setting, parallel, vllm_config.model_config.multimodal_config.mm_encoder_tp_mode)
        self.supports_tower_connector_lora = False  # vLLM counts the tokens that are left, not those of the tower
        self.prepare(vllm_config)

    def prepare(self, vllm_config: VllmConfig) -> None:
        """Do what a family needs done once, if the model is zipped."""
        raise NotImplementedError

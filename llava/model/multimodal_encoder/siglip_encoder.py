"""SigLIP towers: no CLS token, so patches are scored by the attention they receive."""

from __future__ import annotations

from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class SigLipVisionTower(VisionTower):
    """SigLIP, as newer LLaVA-NeXT checkpoints have it (so400m/14 at 384 pixels: 729 patches)."""

    model_class = SiglipVisionModel
    config_class = SiglipVisionConfig
    processor_class = SiglipImageProcessorPil
    cls_token = False

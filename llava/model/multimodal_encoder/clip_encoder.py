"""CLIP towers: a CLS token first."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class CLIPVisionTower(VisionTower):
    """CLIP, as LLaVA-1.5 and LLaVA-NeXT have it (ViT-L/14 at 336 pixels: 576 patches and the CLS token)."""

    model_class = CLIPVisionModel
    config_class = CLIPVisionConfig
    processor_class = CLIPImageProcessorPil
    cls_token = True

    def default_processor(self) -> Any:
        """CLIP's: shortest edge to the resolution, then the centre."""
        edge = self.config.image_size
        return self.processor_class(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})

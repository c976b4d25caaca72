"""What all LLaVA backbones share: towers and projector beside the language model, and how it takes visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava.model.multimodal_encoder.builder import build_towers
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.visual import has_original_positions
from visionzip.language.positions import with_positions
from visionzip.language.size_bias import with_size_bias


class LlavaMetaModel:
    """Backbone with a vision tower, a projector and, for unpadded grids, a newline vector."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not (towers := build_towers(config, delay_load=True)):
            return
        for name, tower in towers.items():
            setattr(self, name, tower)
        self.mm_projector = build_vision_projector(config)
        # Also where a checkpoint has one that its merge type does not use: what was loaded is saved again.
        if "unpad" in getattr(config, "mm_patch_merge_type", "flat") or getattr(config, "mm_image_newline", False):
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        # device_map="auto" goes by this order, and offloads what does not fit: the end of the language model, not a
        # tower, which it keeps in one piece.
        first = ("embed_tokens", *towers, "mm_projector")
        self._modules = {name: self._modules[name] for name in dict.fromkeys((*first, *self._modules))}
        self._no_split_modules = {*self._no_split_modules, *(type(tower).__name__ for tower in towers.values())}

    def get_vision_tower(self) -> VisionTower | None:
        """The vision tower, None for a model without one."""
        return getattr(self, "vision_tower", None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        visual_mask: Tensor | None = None,
        token_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's own forward, to which visual tokens are tokens like others, but for their size and positions.

        ``token_sizes`` (B, L) is as in :func:`visionzip.language.size_bias.attach_size_bias`. ``visual_mask`` (B, L),
        true where they are, is for what listens to this module: the baselines that prune them inside the language model
        (:mod:`visionzip.language`).
        """
        arguments = {"input_ids": input_ids, "token_sizes": token_sizes, **kwargs}
        arguments = with_positions(self, arguments, has_original_positions(self.get_vision_tower()))
        return super().forward(**with_size_bias(self, arguments))

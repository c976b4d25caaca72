"""vLLM's LLaVA-1.5 and LLaVA-NeXT, which are zipped if the model's config has a setting, and otherwise unchanged.

Three things differ from vLLM's own models. An image has fewer placeholders, and its prompt, the scheduler, the KV cache
and ``usage.prompt_tokens`` follow from their number. The setting is part of the key of vLLM's caches. Visual tokens are
chosen, by the same function as in every other family (:func:`visionzip.encoder.choose_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PixtralVisionConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    PixtralHFMultiModalProcessor,
    PixtralHFProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens, has_cls_token, read_encoder, side_length
from visionzip.methods import token_counts
from visionzip.serving.setting import served_setting, tile_tokens, tiles_at_once
from visionzip.serving.vllm_shared import KeyedProcessor, ZippedInfo, ZippedModel
from visionzip.tiles import join_tiles

# transformers 5 saves a tower that it has built itself without "vision_model.", which vLLM's loader needs.
_LONG_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(
            r"^(model\.)?vision_tower\.(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
        ): "vision_tower.vision_model."
    }
)


class _LlavaInfo(ZippedInfo, BaseLlavaProcessingInfo):
    """Count the placeholders of an image."""

    def tiles(self, width: int, height: int) -> int:
        """Count the encoder inputs into which an image is cut."""
        return 1

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Count the visual tokens of an image of this size in pixels."""
        if self.setting is None:
            return super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return self.tiles(image_width, image_height) * tile_tokens(self.setting, self.get_hf_config().vision_config)


class ZippedLlavaInfo(_LlavaInfo, LlavaProcessingInfo):
    """LLaVA-1.5's."""


class ZippedLlavaNextInfo(_LlavaInfo, LlavaNextProcessingInfo):
    """LLaVA-NeXT's."""

    def tiles(self, width: int, height: int) -> int:
        """Count the whole image, and the tiles of its grid."""
        rows, columns = _grid((height, width), self.get_hf_config())
        return 1 + rows * columns


class ZippedLlavaProcessor(KeyedProcessor, LlavaMultiModalProcessor):
    """LLaVA-1.5's."""


class ZippedLlavaNextProcessor(KeyedProcessor, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's."""


class _ZippedTower(ZippedModel):
    """Visual tokens of a model with ``vision_tower`` and ``multi_modal_projector``."""

    def prepare(self, vllm_config: VllmConfig) -> None:
        """Compute how many images may go through the tower at once."""
        tower = self.vision_tower.vision_model
        length = side_length(tower) ** 2 + has_cls_token(tower)
        self._at_once = tiles_at_once(vllm_config.scheduler_config.max_num_encoder_input_tokens, length)

    def _compressed(self, pixel_values: Tensor, setting: VisionZipConfig) -> Iterator[CompressedTokens]:
        """Choose the visual tokens of images or tiles (N, 3, h, w), a few at a time, before the projector."""
        tower = self.vision_tower.vision_model

        def run(_tower: nn.Module, pixels: Tensor, _layers: int) -> Tensor:
            return self.vision_tower(pixels.to(tower.dtype), feature_select_strategy="full")  # it has these layers only

        for pixels in pixel_values.split(self._at_once):
            yield choose_tokens(read_encoder(tower, pixels, setting, run), setting, self.multi_modal_projector)


class ZippedLlava(_ZippedTower, LlavaForConditionalGeneration):
    """LLaVA-1.5, and Pixtral's models of that class, which cannot be zipped."""

    hf_to_vllm_mapper = _LONG_NAMES | LlavaForConditionalGeneration.hf_to_vllm_mapper

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: Tensor) -> Any:
        if self.setting is None:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        return torch.cat([each.tokens for each in self._compressed(pixel_values, self.setting)])


class ZippedLlavaNext(_ZippedTower, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: each tile is compressed alone, in the order of :func:`visionzip.tiles.tile_order`."""

    hf_to_vllm_mapper = _LONG_NAMES | LlavaNextForConditionalGeneration.hf_to_vllm_mapper

    def _process_image_input(self, image_input: Mapping[str, Any]) -> Any:
        if self.setting is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        grids = [_grid(tuple(size), self.config) for size in image_input["image_sizes"].tolist()]
        counts = [1 + rows * columns for rows, columns in grids]
        # later tiles only fill up the batch
        tiles = [image[:count] for image, count in zip(image_input["pixel_values"], counts, strict=True)]
        compressed = list(self._compressed(torch.cat(tiles), self.setting))
        features = self.multi_modal_projector(torch.cat([each.tokens for each in compressed])).split(counts)
        kept = torch.cat([each.dominant_indices for each in compressed]).split(counts)
        tower = self.vision_tower.vision_model
        side, cls_token = side_length(tower), has_cls_token(tower)
        cls = {"cls_token": cls_token, "keeps_cls": token_counts(self.setting, side**2, cls_token).cls_token}
        return [
            join_tiles(tokens, indices, (columns, rows), side, **cls)
            for tokens, indices, (rows, columns) in zip(features, kept, grids, strict=True)
        ]


def _grid(size: tuple[int, int], config: Any) -> tuple[int, int]:
    """Compute (rows, columns) of the tiles of an image of (height, width) pixels, without the whole image."""
    return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)


def _llava_info(context: Any) -> BaseLlavaProcessingInfo:
    config = context.get_hf_config()
    if isinstance(config.vision_config, PixtralVisionConfig) and served_setting(config) is None:
        return PixtralHFProcessingInfo(context)
    return ZippedLlavaInfo(context)


def _llava_processor(info: BaseLlavaProcessingInfo, dummy_inputs: Any) -> Any:
    kind = PixtralHFMultiModalProcessor if isinstance(info, PixtralHFProcessingInfo) else ZippedLlavaProcessor
    return kind(info, dummy_inputs)


for _model, _processor, _info in (
    (ZippedLlava, _llava_processor, _llava_info),
    (ZippedLlavaNext, ZippedLlavaNextProcessor, ZippedLlavaNextInfo),
):
    MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)(_model)

"""vLLM's Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which are zipped if the model's config has a setting.

They differ from vLLM's own models as :mod:`visionzip.serving.vllm_llava` says. Besides, a kept token has the row and
column of its patch, and text its position in the uncompressed prompt. Positions of text follow from the sizes of images
alone, so that the engine has them as a request arrives. The rows and columns come with the embeddings
(:mod:`visionzip.serving.places`), and are added as the model runs, like Qwen3-VL's deepstack. So a prompt may be cut
anywhere (chunked prefill, prefix caching), and vLLM's own recomputation of positions has no part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from visionzip.attention import packed_scores, read_parts
from visionzip.config import VisionZipConfig
from visionzip.encoder import reads_of
from visionzip.integrations.seam.choice import choose_in_frames, is_whole
from visionzip.integrations.seam.families import token_merger
from visionzip.methods import token_counts
from visionzip.serving.places import Placed, prompt_positions, split_places, with_places
from visionzip.serving.setting import check_engine, images_at_once
from visionzip.serving.vllm_shared import KeyedProcessor, ZippedInfo, ZippedModel

_LONGEST = 200  # times as long as high: Qwen-VL's processors take no longer image
_LONGER = 4  # positions that the rotary embedding knows, for each token of the longest prompt


def _kept(setting: VisionZipConfig, tokens: int) -> int:
    return token_counts(setting, tokens, False).total


class _QwenInfo(ZippedInfo):
    """Counts placeholders, and takes images only."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return which media the model takes: no videos if it is zipped."""
        limits = super().get_supported_mm_limits()
        return limits if self.setting is None else {**limits, "video": 0}

    def get_num_image_tokens(self, **size: Any) -> int:
        """Count the visual tokens of an image of this size in pixels."""
        tokens = super().get_num_image_tokens(**size)
        return tokens if self.setting is None else _kept(self.setting, tokens)

    def check_positions(self, inputs: Any, setting: VisionZipConfig) -> None:
        """Refuse a request with more positions than the model is made ready for.

        An image has as many positions as rows or columns, and these may be more than its kept tokens.

        Raises:
            VLLMValidationError: the images have too many, which the client gets as an error 400.
        """
        vision, given = self.get_hf_config().vision_config, inputs.hf_processor_mm_kwargs
        processor, unit = self.get_image_processor(**given), vision.patch_size * vision.spatial_merge_size
        images, beyond = inputs.mm_data_items.get("image", ()), 0
        for index in range(len(images)):
            if images.get(index) is None:  # known to the cache by its name alone: it may be the longest there is
                beyond += isqrt(_LONGEST * processor.size["longest_edge"]) // unit
                continue
            width, height = images.get_image_size(index)
            size = {"image_width": width, "image_height": height, "image_processor": processor, "mm_kwargs": given}
            resized, tokens = self._get_vision_info(**size, modality="image")
            beyond += max(0, max(resized) // unit - _kept(setting, tokens))
        if beyond > (most := (_LONGER - 1) * self.ctx.model_config.max_model_len):
            raise VLLMValidationError(
                f"{len(images)} images have {beyond} positions more than kept tokens, and {most} are possible: ask "
                "about fewer or smaller images"
            )


class _QwenProcessor(KeyedProcessor):
    """Gives images fewer placeholders."""

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        if (setting := self.info.setting) is not None:
            self.info.check_positions(
                inputs, setting
            )  # here, as this sees all images of a request, whether cached or not
        return super()._get_mm_hashes(inputs)

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(*args, **kwargs)
        if (setting := self.info.setting) is None:
            return updates

        def shortened(placeholders: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
            def of_image(index: int) -> list[int]:
                all_ = placeholders(index)
                return all_[: _kept(setting, len(all_))]

            return of_image

        images = [each for each in updates if each.modality == "image"]
        return [dataclasses.replace(each, replacement=shortened(each.replacement)) for each in images]


class _ZippedQwen(ZippedModel):
    """Visual tokens and positions of a model with ``visual``."""

    def prepare(self, vllm_config: VllmConfig) -> None:
        """Make room for rows and columns, and for positions beyond the number of tokens."""
        check_engine(vllm_config)
        scheduler = vllm_config.scheduler_config
        self._budget = scheduler.max_num_encoder_input_tokens
        self._places = torch.zeros(scheduler.max_num_batched_tokens + 1, 2, dtype=torch.int64)
        rotary = [each for each in self.language_model.modules() if isinstance(each, MRotaryEmbedding)]
        if not rotary:
            raise ValueError(f"{type(self.language_model).__name__} has no rotary positions of three axes")
        for each in rotary:
            _lengthen(each, _LONGER * vllm_config.model_config.max_model_len)

    def get_encoder_cudagraph_config(self) -> Any:
        """Return vLLM's own, but for no kind of input, as hooks do not run in a replayed graph."""
        config = super().get_encoder_cudagraph_config()
        return config if self.setting is None else dataclasses.replace(config, modalities=[])

    # --- visual tokens ---

    def _process_image_input(self, image_input: Mapping[str, Any]) -> Any:
        if self.setting is None:
            return super()._process_image_input(image_input)
        grid, unit = image_input["image_grid_thw"].cpu(), self.visual.spatial_merge_size**2
        counts = images_at_once(self._budget, (grid.prod(dim=1) // unit).tolist())
        grids = grid.split(counts)
        pixels = image_input["pixel_values"].split([int(own.prod(dim=1).sum()) for own in grids])
        return [tokens for each in zip(pixels, grids, strict=True) for tokens in self._chosen(*each, self.setting)]

    def _chosen(self, pixels: Tensor, grid: Tensor, setting: VisionZipConfig) -> Iterator[Tensor]:
        """Choose the tokens of images in packed patches (S, C); yield those of each, with their places."""
        sizes = [(rows, columns) for _, rows, columns in (grid // self.visual.spatial_merge_size).tolist()]
        scored = reads_of(setting) & {"scores", "keys"} and not all(is_whole(setting, size) for size in sizes)
        lengths = grid.prod(dim=1).tolist()
        with _read_attention(self.visual.blocks[setting.layer].attn, lengths) if scored else nullcontext() as found:
            features = self.visual(pixels, grid_thw=grid.tolist())
        scores, keys = (None, None) if found is None else map(token_merger(self.visual, grid), found[0])
        # the tokens of deepstack's layers lie side by side with those of the first
        layers = features.split(self.config.get_text_config().hidden_size, dim=1)
        chosen = choose_in_frames(list(layers), sizes, scores, keys, pixels, [setting] * len(sizes))
        for image, (_, columns) in enumerate(sizes):
            tokens = torch.cat([layer[image] for layer in chosen.layers], dim=1)
            yield with_places(tokens, chosen.places[image], columns)

    # --- positions ---

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Compute the positions (3, L) of a prompt; of images' tokens, as :func:`prompt_positions` has them."""
        if self.setting is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        images = []
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            _, rows, columns = (feature.data["image_grid_thw"].data // self.visual.spatial_merge_size).tolist()
            images.append(Placed(feature.mm_position.offset, feature.mm_position.length, rows, columns))
        return prompt_positions(len(input_tokens), images)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embed tokens (n,) and put images' tokens among them; their places wait for :meth:`forward`."""
        if self.setting is not None and multimodal_embeddings:
            split = [split_places(each) for each in multimodal_embeddings]
            multimodal_embeddings = [tokens for tokens, _ in split]
            self._places[: len(input_ids)][is_multimodal] = torch.cat([places for _, places in split])
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the language model on positions (3, n), to which images' tokens add their rows and columns."""
        if self.setting is None:
            return super().forward(input_ids, positions, *args, **kwargs)
        places = self._places[: positions.shape[-1]]  # a buffer, so that a replayed CUDA graph reads it too
        out = super().forward(input_ids, torch.cat([positions[:1], positions[1:] + places.T]), *args, **kwargs)
        places.zero_()
        return out


@contextmanager
def _read_attention(attention: nn.Module, lengths: list[int]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what :func:`packed_scores` returns of images of these lengths in a layer of vLLM's encoders."""

    def score(outputs: dict[str, Tensor], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        heads = outputs["qkv"].squeeze(1).unflatten(-1, (3, attention.num_attention_heads_per_partition, -1))
        queries, keys, _ = heads.permute(1, 0, 2, 3).unbind()  # each (S, H, Dh)
        turned = attention.apply_rotary_emb(
            torch.stack([queries, keys]), given["rotary_pos_emb_cos"], given["rotary_pos_emb_sin"]
        ).transpose(1, 2)
        return packed_scores(turned[0], turned[1], keys.transpose(0, 1), lengths, queries.shape[-1] ** -0.5)

    with read_parts(attention, ("qkv",), score) as found:
        yield found


def _lengthen(rotary: MRotaryEmbedding, positions: int) -> None:
    """Let a rotary embedding know so many positions: an image that keeps few tokens spans more positions than those.

    Raises:
        ValueError: the embedding is of a kind whose longer table would not begin with its shorter one.
    """
    known = rotary.cos_sin_cache
    if len(known) >= positions:
        return
    by = rotary.base if rotary.scaling_factor is None else rotary.scaling_factor
    angles = torch.arange(positions, device=known.device)[:, None] * rotary._compute_inv_freq(by).to(known.device)
    table = (torch.cat([angles.cos(), angles.sin()], dim=1) * rotary.mscale).to(known.dtype)
    if not torch.allclose(table[: len(known)], known, atol=1e-2):
        raise ValueError(f"rotary positions of this kind ({type(rotary).__name__}) are unknown: this cannot be served")
    rotary.register_buffer("cos_sin_cache", torch.cat([known, table[len(known) :]]), persistent=False)


class _Qwen2Info(_QwenInfo, Qwen2VLProcessingInfo):
    """Qwen2-VL's."""


class _Qwen25Info(_QwenInfo, Qwen2_5_VLProcessingInfo):
    """Qwen2.5-VL's."""


class _Qwen3Info(_QwenInfo, Qwen3VLProcessingInfo):
    """Qwen3-VL's."""


class _Qwen2Processor(_QwenProcessor, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's."""


class _Qwen25Processor(_QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's."""


class _Qwen3Processor(_QwenProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's."""


@MULTIMODAL_REGISTRY.register_processor(_Qwen2Processor, info=_Qwen2Info, dummy_inputs=Qwen2VLDummyInputsBuilder)
class ZippedQwen2(_ZippedQwen, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(_Qwen25Processor, info=_Qwen25Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class ZippedQwen25(_ZippedQwen, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(_Qwen3Processor, info=_Qwen3Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class ZippedQwen3(_ZippedQwen, Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""

"""What all LLaVA models share: visual tokens, and where they go in the prompt.

The classes here are mixed in before a backbone's own (``class LlavaLlamaModel(LlavaMetaModel, LlamaModel)``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.generation import REFUSED, check_settings, own_memory, padding_id, with_row_lengths
from llava.model.loading import CheckedLoading
from llava.model.multimodal_encoder.builder import build_towers
from llava.model.multimodal_encoder.vision_tower import EncodedImage, VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.prompts import (
    as_tiles,
    check_images,
    check_mask,
    check_prompts,
    check_vocabulary,
    first_places,
    images_per_row,
    pad_rows,
    padding_mask,
    refuse_sentinels_without_images,
    splice,
    visual_positions,
)
from llava.model.tiles import Layout, lay_out_tiles, tile_layouts, unpad_image
from visionzip.encoder import check_finite
from visionzip.integrations.generation import refuse_drafts_behind_a_cache, with_mask_of_ids
from visionzip.tiles import join_tiles

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]

logger = logging.get_logger(__name__)

Images = Tensor | Sequence[Tensor] | Sequence[EncodedImage]
Sizes = Sequence[tuple[int, int]]
Prepared = tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]


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

    def forward(self, *args: Any, visual_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's own forward, to which visual tokens are tokens like others.

        ``visual_mask`` (B, L), true where they are, is for what listens to this module: the baselines that prune them
        inside the language model (:mod:`visionzip.language`).
        """
        return super().forward(*args, **kwargs)


class LlavaMetaForCausalLM(CheckedLoading):
    """Causal language model that also takes images."""

    backbone_class: ClassVar[type[nn.Module]]
    takes_videos: ClassVar[bool] = False  # among the images, with an <image> for each frame

    def __init__(self, config: Any) -> None:
        # Not super().__init__: that would build the text-only backbone first.
        PreTrainedModel.__init__(self, config)
        self.model = self.backbone_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.register_forward_pre_hook(own_memory)
        self.post_init()

    def get_model(self) -> Any:
        """The backbone, with ``vision_tower``, ``mm_projector`` and ``embed_tokens``."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """The vision tower, None for a model without one."""
        return self.model.get_vision_tower()

    def towers(self) -> dict[str, VisionTower]:
        """All towers, by what the names of their encoders' weights begin with."""
        towers = ((name, module) for name, module in self.model.named_children() if isinstance(module, VisionTower))
        return {f"model.{name}.{tower.encoder_prefix}": tower for name, tower in towers}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        image_sizes: Sizes | None = None,
        visual_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward, with its arguments in LLaVA's order.

        ``images`` and ``image_sizes`` are as in :meth:`generate`, and so is what is raised; ``visual_mask`` (B, L)
        says where ``inputs_embeds`` has visual tokens (only FastV and SparseVLM ask); the others as in transformers.
        """
        # logits_to_keep is by name because transformers' generate looks for it: else it asks for every token's logits.
        flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        kwargs |= {name: value for name, value in (flags | {"use_cache": use_cache}).items() if value is not None}
        if inputs_embeds is None and (images is not None or past_key_values is None):
            prepared, visual_mask = self._prepare(
                input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = prepared
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            visual_mask=visual_mask,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sizes | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer prompts with images; transformers' ``generate`` with all its arguments.

        Args:
            inputs: (B, L) prompts with the image sentinel, from ``tokenizer_image_token``; also as ``input_ids``.
                Rows of different lengths need ``attention_mask`` (or padding with ``pad_token_id``), on either side:
                inside they are padded on the left, so that each row answers as it would alone.
            images: one per sentinel, in the order of the prompts: (N, 3, h, w), (N, tiles, 3, h, w), or a list of
                (3, h, w) and (tiles, 3, h, w). A text-only row may be left out or have one dummy image.
            image_sizes: (width, height) of each image, needed for tiles.
            **kwargs: transformers' own: ``attention_mask``, ``max_new_tokens``, ``num_beams``, ``streamer``, …

        Returns:
            The new tokens only, without the prompt: (B, new).

        Raises:
            ValueError: the prompts and images do not fit together, a pixel is not finite, an id is not the model's, or
                a setting is not for embeddings (:mod:`llava.model.generation`).
            TypeError: the images are not tensors.
        """
        inputs = kwargs.pop("input_ids", inputs)
        check_settings(REFUSED, self, kwargs)
        refuse_drafts_behind_a_cache(self, kwargs.get("generation_config"), kwargs)
        if kwargs.get("inputs_embeds") is not None:
            return super().generate(**with_row_lengths(self, kwargs))
        check_prompts(inputs)
        kwargs.pop("position_ids", None)  # follow from the mask
        mask = kwargs.pop("attention_mask", None)
        if mask is None and len(inputs) > 1 and (pad := padding_id(self, kwargs)) is not None:
            mask = padding_mask(inputs, pad)
        rows, _, visual = self._embed_prompts(inputs, mask, None, images, image_sizes)
        embeds, mask, _, _ = pad_rows(rows, None, side="left")
        where = pad_sequence(visual, batch_first=True, padding_side="left").to(mask.device)
        kwargs |= {"inputs_embeds": embeds, "attention_mask": mask.long(), "visual_mask": where}
        return super().generate(**with_row_lengths(self, kwargs))

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_logits_processor(*args, **with_mask_of_ids(kwargs))

    def encode_images(self, images: Tensor) -> Tensor:
        """Visual tokens in the language model's width: (B, N, hidden_size) of images (B, 3, h, w).

        Raises:
            ValueError: a pixel is not finite, or the images' size is not the encoder's.
        """
        check_finite(images, [1] * len(images))
        tower = self.get_vision_tower()
        return self._project(tower.encode(images.to(tower.dtype), self._project)[0])

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sizes | None = None,
    ) -> Prepared:
        """Put visual tokens where the prompts have the image sentinel.

        Args:
            input_ids: (B, L) prompts.
            position_ids: (B, L) or None.
            attention_mask: (B, L), 0 or False for padding, or None; with a cache (B, past + L).
            past_key_values: passed through.
            labels: (B, L) or None.
            images: as in :meth:`generate`. With labels, a batch of text only may carry dummy images too (training).
            image_sizes: (width, height) of each image.

        Returns:
            LLaVA's six values: None, position_ids, attention_mask, past_key_values, inputs_embeds (B, L', hidden_size)
            and labels (visual positions ignored); those that were None are None again. Rows are padded on
            ``config.tokenizer_padding_side`` and cut at ``config.tokenizer_model_max_length``. Without images the
            arguments come back as they are, with None for the embeddings.

        Raises:
            ValueError: the prompts and images do not fit together, or a pixel is not finite.
            TypeError: the images are not tensors.
        """
        return self._prepare(input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)[0]

    def _prepare(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sizes | None,
    ) -> tuple[Prepared, Tensor | None]:
        """LLaVA's six values, and where the embeddings have visual tokens: (B, L') bool, None without embeddings."""
        check_prompts(input_ids)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        decoding = past > 0 and input_ids.shape[1] == 1
        if decoding or images is None or self.get_vision_tower() is None:
            if not decoding:
                refuse_sentinels_without_images(input_ids)
            return (input_ids, position_ids, attention_mask, past_key_values, None, labels), None
        past_mask = None
        if attention_mask is not None:
            past_mask, attention_mask = attention_mask[:, :past], attention_mask[:, past:]
        rows, row_labels, visual = self._embed_prompts(input_ids, attention_mask, labels, images, image_sizes)
        side = getattr(self.config, "tokenizer_padding_side", "right")
        embeds, mask, positions, new_labels = pad_rows(rows, row_labels, side)
        prepared = (
            None,
            None if position_ids is None else positions,
            None if past_mask is None else torch.cat([past_mask, mask.to(past_mask)], dim=1),
            past_key_values,
            embeds,
            new_labels,
        )
        return prepared, pad_sequence(visual, batch_first=True, padding_side=side).to(mask.device)

    def _embed_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sizes | None,
    ) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor]]:
        """Of each prompt, without padding: embeddings (L', D), labels (L',), and where visual tokens are (L',) bool."""
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        check_mask(input_ids, keep)
        check_vocabulary(input_ids, keep, self.get_model().embed_tokens.num_embeddings)
        prompts = [row[mask] for row, mask in zip(input_ids, keep, strict=True)]
        row_labels = None if labels is None else [row[mask] for row, mask in zip(labels, keep, strict=True)]
        markers = [int((prompt == IMAGE_TOKEN_INDEX).sum()) for prompt in prompts]
        none = images is None or (isinstance(images, Tensor | Sequence) and len(images) == 0)
        if none or self.get_vision_tower() is None:
            refuse_sentinels_without_images(input_ids)
            visual: list[Tensor] = []
            takes = [0] * len(prompts)
        else:
            check_images(images)
            takes = images_per_row(markers, self.count_markers(images), training=labels is not None)
            visual = self.visual_tokens(images, image_sizes)
        embed = self.get_model().embed_tokens
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        remaining = iter(visual)
        rows, new_labels, where = [], [], []
        for index, prompt in enumerate(prompts):
            own = [next(remaining) for _ in range(takes[index])]
            row, expanded = splice(prompt, own, embed, None if row_labels is None else row_labels[index])
            if limit is not None and len(row) > limit:
                logger.warning_once(
                    f"a prompt of {len(row)} tokens was cut at tokenizer_model_max_length={limit}; its end is lost"
                )
            rows.append(row[:limit])
            new_labels.append(None if expanded is None else expanded[:limit])
            where.append(visual_positions(prompt, own)[:limit])
        return rows, None if labels is None else new_labels, where

    def count_markers(self, images: Images) -> int:
        """How many ``<image>`` stand for these images in a prompt."""
        return len(images)

    @property
    def frame_length(self) -> int:
        """Visual tokens of one frame of a video, not zipped."""
        return self.get_vision_tower().num_patches

    def visual_tokens(self, images: Images, image_sizes: Sizes | None = None) -> list[Tensor]:
        """What the language model sees of each image: (n, hidden_size), all tiles encoded in one batch.

        Args:
            images: as in :meth:`generate`, or a list of what the tower has made of each (:class:`EncodedImage`), with
                which it is not run. What is in a list several times (questions about one image) is encoded once.
            image_sizes: (width, height) of each image, needed for tiles.

        Raises:
            ValueError: a pixel is not finite, or the tiles do not fit the image's size.
            TypeError: the images are not tensors.
        """
        check_images(images)
        if isinstance(images, Tensor) and images.ndim == 4:
            return list(self.encode_images(images))
        tower = self.get_vision_tower()
        images = list(images)  # holds them: an object's id is its own only while it lives
        encoded = [image for image in images if isinstance(image, EncodedImage)]
        if encoded and len(encoded) < len(images):
            raise TypeError(f"{len(encoded)} of {len(images)} images are EncodedImage: give either these or tensors")
        tiles = [image.tokens for image in encoded]
        if not encoded:
            tiles = [as_tiles(image, index, tower.config.image_size) for index, image in enumerate(images)]
        first = first_places(images, image_sizes)
        layouts = self._layouts([len(image) for image in tiles], image_sizes)
        # 0 for an image that came before, so that the messages of check_finite still count all of them
        counts = [len(image) if first[index] == index else 0 for index, image in enumerate(tiles)]
        used = [index for index, count in enumerate(counts) if count]
        if encoded:
            tokens = torch.cat([tiles[index] for index in used])
            zipped = encoded[0].dominant_indices is not None
            indices = torch.cat([encoded[index].dominant_indices for index in used]) if zipped else None
        else:
            batch = torch.cat([tiles[index].to(tower.device) for index in used])
            check_finite(batch, counts)
            tokens, indices = tower.encode(batch.to(tower.dtype), self._project)  # it returns the type that it is given
        tokens = self._project(tokens)
        kept: Sequence[Tensor | None] = [None] * len(tiles) if indices is None else indices.split(counts)
        merged = {
            index: self._merge_tiles(image, indices, layout)
            for index, (image, indices, layout) in enumerate(zip(tokens.split(counts), kept, layouts, strict=True))
            if counts[index]
        }
        return [merged[place] for place in first]

    def _layouts(self, counts: list[int], image_sizes: Sizes | None) -> list[Layout | None]:
        """How each image's tiles are laid out; checked before the tower runs."""
        merge_type = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge_type not in ("flat", "spatial", "spatial_unpad"):
            raise ValueError(f"mm_patch_merge_type={merge_type!r} is unknown: use 'flat', 'spatial' or 'spatial_unpad'")
        if merge_type == "flat":
            return [None] * len(counts)
        if merge_type == "spatial_unpad" and not hasattr(self.get_model(), "image_newline"):
            raise ValueError("mm_patch_merge_type='spatial_unpad' needs model.image_newline, which this model lacks")
        pinpoints = getattr(self.config, "image_grid_pinpoints", None)
        return tile_layouts(counts, image_sizes, pinpoints, self.get_vision_tower().config.image_size)

    def _project(self, tokens: Tensor) -> Tensor:
        projector = self.get_model().mm_projector
        dtype = next((parameter.dtype for parameter in projector.parameters()), self.dtype)
        return projector(tokens.to(dtype))

    def _merge_tiles(self, tokens: Tensor, dominant_indices: Tensor | None, layout: Layout | None) -> Tensor:
        """One image's sequence (n, D) from its tiles (T, N, D), by ``config.mm_patch_merge_type``."""
        merge_type = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge_type == "flat":
            return tokens.flatten(0, 1)
        newline = self.get_model().image_newline if merge_type == "spatial_unpad" else None
        if layout is None:
            return tokens[0] if newline is None else torch.cat([tokens[0], newline[None].to(tokens)])
        tower = self.get_vision_tower()
        if dominant_indices is None:
            return lay_out_tiles(tokens, layout, tower.num_patches_per_side, newline)
        cls = {"cls_token": tower.cls_token, "keeps_cls": tower.counts.cls_token}
        return join_tiles(tokens, dominant_indices, layout.grid, tower.num_patches_per_side, **cls)

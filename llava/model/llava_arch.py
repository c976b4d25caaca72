"""What all LLaVA models share: visual tokens, and where they go in the prompt.

The classes here are mixed in before a backbone's own (``class LlavaLlamaModel(LlavaMetaModel, LlamaModel)``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.backbone import LlavaMetaModel
from llava.model.checkpoints.loading import CheckedLoading
from llava.model.generation import REFUSED, check_settings, own_memory, padding_id, with_row_lengths
from llava.model.image_encoding import ImageEncoding, Images, Sizes
from llava.model.prompts import (
    Padded,
    check_images,
    check_mask,
    check_prompts,
    check_vocabulary,
    images_per_row,
    pad_rows,
    padding_mask,
    refuse_images_at_the_end,
    refuse_sentinels_without_images,
    splice,
)
from llava.model.tiles import unpad_image
from llava.model.visual import VisualTokens, check_embeds
from visionzip.encoder import check_tokens
from visionzip.integrations.generation import refuse_drafts_behind_a_cache, with_mask_of_ids
from visionzip.language.positions import next_positions

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]

logger = logging.get_logger(__name__)

Prepared = tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]


class LlavaMetaForCausalLM(ImageEncoding, CheckedLoading):
    """Causal language model that also takes images."""

    backbone_class: ClassVar[type[nn.Module]]
    takes_videos: ClassVar[bool] = False  # among the images, with an <image> for each frame
    cut_prompts: tuple[bool, ...] = ()  # of the last batch with labels: which lost their end

    def __init__(self, config: Any) -> None:
        # Not super().__init__: that would build the text-only backbone first.
        PreTrainedModel.__init__(self, config)
        self.model = self.backbone_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.register_forward_pre_hook(own_memory)
        self.post_init()

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
        token_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward, with its arguments in LLaVA's order.

        ``images`` and ``image_sizes`` are as in :meth:`generate`, and so is what is raised. Of ``inputs_embeds``,
        ``visual_mask`` (B, L) says where the visual tokens are (only FastV and SparseVLM ask), and ``token_sizes``
        (B, L) how many patches each stands for, 1 for text (with a size bias). The others are as in transformers.
        """
        # logits_to_keep is by name because transformers' generate looks for it: else it asks for every token's logits.
        flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        kwargs |= {name: value for name, value in (flags | {"use_cache": use_cache}).items() if value is not None}
        if inputs_embeds is None and (images is not None or past_key_values is None):
            prepared, visual_mask, token_sizes = self.prepare(
                input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = prepared
        elif inputs_embeds is None:  # generate gives the sizes of the whole prompt with every step
            token_sizes = None
        if token_sizes is not None:
            kwargs["token_sizes"] = token_sizes[:, -inputs_embeds.shape[1] :]
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
            check_embeds(self.get_vision_tower(), kwargs)
            return super().generate(**with_row_lengths(self, kwargs))
        check_prompts(inputs)
        kwargs.pop("position_ids", None)  # follow from the mask
        mask = kwargs.pop("attention_mask", None)
        if mask is None and len(inputs) > 1 and (pad := padding_id(self, kwargs)) is not None:
            mask = padding_mask(inputs, pad)
        padded, original = self._embed_prompts(inputs, mask, None, images, image_sizes, side="left")
        kwargs |= {"inputs_embeds": padded.embeds, "attention_mask": padded.mask.long(), "visual_mask": padded.visual}
        if original:
            kwargs["position_ids"] = padded.positions
        if padded.sizes is not None:
            kwargs["token_sizes"] = padded.sizes
        return super().generate(**with_row_lengths(self, kwargs))

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_logits_processor(*args, **with_mask_of_ids(kwargs))

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
            and labels (visual positions ignored); those that were None are None again, but for position_ids and the
            mask with ``positions="original"``. Rows are padded on ``config.tokenizer_padding_side`` and cut at
            ``config.tokenizer_model_max_length`` positions. Without images the arguments come back as they are, with
            None for the embeddings.

        Raises:
            ValueError: the prompts and images do not fit together, a pixel is not finite, or the setting has a size
                bias, for which six values have no place (:meth:`prepare` has).
            TypeError: the images are not tensors.
        """
        arguments = (input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)
        prepared, _, sizes = self.prepare(*arguments)
        if sizes is not None:
            raise ValueError(
                "LLaVA's six values have no place for token_sizes, which this model's size bias needs: call "
                "model.prepare, which returns them besides, or set size_bias=False"
            )
        return prepared

    def prepare(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sizes | None = None,
    ) -> tuple[Prepared, Tensor | None, Tensor | None]:
        """Put visual tokens where the prompts have the image sentinel, and say what they are.

        Arguments and errors are those of :meth:`prepare_inputs_labels_for_multimodal`, but for the size bias.

        Returns:
            LLaVA's six values; ``visual_mask`` (B, L') bool, None without embeddings; and ``token_sizes`` (B, L')
            float32, None without a size bias.
        """
        check_prompts(input_ids)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        decoding = past > 0 and input_ids.shape[1] == 1
        if decoding or images is None or self.get_vision_tower() is None:
            if labels is not None:
                self.cut_prompts = (False,) * len(input_ids)
            if not decoding:
                refuse_sentinels_without_images(input_ids)
            return (input_ids, position_ids, attention_mask, past_key_values, None, labels), None, None
        past_mask = None
        if attention_mask is not None:
            past_mask, attention_mask = attention_mask[:, :past], attention_mask[:, past:]
        side = getattr(self.config, "tokenizer_padding_side", "right")
        padded, original = self._embed_prompts(input_ids, attention_mask, labels, images, image_sizes, side)
        positions = None if position_ids is None else padded.positions
        if original:
            before = next_positions(past_key_values, len(input_ids))
            if before is None:
                before = past if past_mask is None else past_mask.long().sum(dim=1, keepdim=True)
            positions = torch.where(padded.mask, padded.positions + before, 0)
            if past_mask is None:  # without a mask, transformers would take each jump for a prompt of its own
                past_mask = padded.mask.new_ones(len(input_ids), past)
        prepared = (
            None,
            positions,
            None if past_mask is None else torch.cat([past_mask, padded.mask.to(past_mask)], dim=1),
            past_key_values,
            padded.embeds,
            padded.labels,
        )
        return prepared, padded.visual, padded.sizes

    def _embed_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sizes | None,
        side: str,
    ) -> tuple[Padded, bool]:
        """The prompts as the language model gets them, and whether they have original positions."""
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        check_mask(input_ids, keep)
        check_vocabulary(input_ids, keep, self.get_model().embed_tokens.num_embeddings)
        prompts = [row[mask] for row, mask in zip(input_ids, keep, strict=True)]
        row_labels = None if labels is None else [row[mask] for row, mask in zip(labels, keep, strict=True)]
        markers = [int((prompt == IMAGE_TOKEN_INDEX).sum()) for prompt in prompts]
        none = images is None or (isinstance(images, Tensor | Sequence) and len(images) == 0)
        if none or self.get_vision_tower() is None:
            refuse_sentinels_without_images(input_ids)
            visual: list[VisualTokens] = []
            takes = [0] * len(prompts)
        else:
            check_images(images)
            takes = images_per_row(markers, self.count_markers(images), training=labels is not None)
            visual = self.placed_tokens(images, image_sizes)
            if visual and not self.training:
                check_tokens([image.tokens for image in visual])
        original = any(image.places is not None for image in visual)
        if original and labels is None:
            refuse_images_at_the_end(prompts)
        embed = self.get_model().embed_tokens
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        remaining = iter(visual)
        rows, cut = [], []
        for index, prompt in enumerate(prompts):
            own = [next(remaining) for _ in range(takes[index])]
            row = splice(prompt, own, embed, None if row_labels is None else row_labels[index])
            if limit is not None and row.end > limit:
                logger.warning_once(
                    f"a prompt of {row.end} tokens was cut at tokenizer_model_max_length={limit}; its end is lost"
                )
            rows.append(row.cut(limit))
            cut.append(limit is not None and row.end > limit)
        if labels is not None:
            self.cut_prompts = tuple(cut)
        return pad_rows(rows, side), original

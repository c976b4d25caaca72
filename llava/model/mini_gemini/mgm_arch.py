"""Mini-Gemini (arXiv 2403.18814): LLaVA with a second, high-resolution tower, in which each visual token looks closer.

An image comes in the high resolution only; the CLIP tower's smaller input is made from it, as the released scripts do.
With VisionZip (the paper's Table 14) the CLIP tower's own attention chooses, and only what it keeps is mined:

- a dominant patch, as without VisionZip: its own sub-patches;
- a contextual token asks as what it has become, and reads the sub-patches of its target patch. All the patches that
  were merged into it would be nearly the whole image again, whose mining is to be saved;
- the CLS token, which Mini-Gemini without VisionZip does not pass on, stands for the whole image: its sub-patches are
  averages over it, as many as a patch has.

No VisionZip code for this family was released; the last two are decisions made here. So is that each tile of an -HD
image (the whole, then its quarters) is zipped by itself, to K + M tokens, and the tiles keep their order; the paper has
no figures of -HD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel, Sizes
from llava.model.mini_gemini.image_pairs import ImagePair, Images, grid_of, pair_of, paired
from llava.model.mini_gemini.mining import average_patches, mine, sub_patches
from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.model.multimodal_encoder.openclip_encoder import STRIDE, OpenCLIPVisionTower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.prompts import check_images, first_places
from llava.model.visual import VisualTokens, lay_out
from visionzip.encoder import check_finite

__all__ = ["MGMMetaForCausalLM", "MGMMetaModel"]


class MGMMetaModel(LlavaMetaModel):
    """Backbone with two vision towers, a projector, and the projections of patch info mining."""

    def __init__(self, config: Any) -> None:
        _check_config(config)
        super().__init__(config)
        _check_sizes(config, self.vision_tower, self.vision_tower_aux)
        width, width_aux = self.vision_tower.hidden_size, self.vision_tower_aux.hidden_size
        for name, inputs in (("query", width), ("aux", width_aux), ("val", width_aux)):
            self.add_module(f"vlm_uni_{name}_projector", nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width)))
        # Behind them all, so that device_map="auto" keeps the projections where the towers are.
        for name in ("layers", "norm", "rotary_emb"):
            self._modules[name] = self._modules.pop(name)

    def get_vision_tower_aux(self) -> OpenCLIPVisionTower:
        """The high-resolution tower."""
        return self.vision_tower_aux


class MGMMetaForCausalLM(LlavaMetaForCausalLM):
    """Causal language model that takes images in a high resolution, with the original code's arguments.

    ``images`` are (3, a, a) each, a = ``config.image_size_aux``, as ``process_images`` makes them; image_sizes are not
    needed. As in the original code, ``images`` may also be in the CLIP tower's resolution, with the high one in
    ``images_aux``.
    """

    def get_vision_tower_aux(self) -> OpenCLIPVisionTower:
        """The high-resolution tower."""
        return self.model.get_vision_tower_aux()

    def towers(self) -> dict[str, Any]:
        """Both towers, by what the names of their weights begin with."""
        return super().towers() | {"model.vision_tower_aux.": self.get_vision_tower_aux()}

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
        images_aux: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sizes | None = None,
        visual_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        token_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """LLaVA's, with Mini-Gemini's ``images_aux`` where that has it."""
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            use_cache,
            output_attentions,
            output_hidden_states,
            paired(images, images_aux),
            image_sizes,
            visual_mask,
            logits_to_keep,
            token_sizes,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        images_aux: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sizes | None = None,
        **kwargs: Any,
    ) -> Any:
        """LLaVA's, with Mini-Gemini's ``images_aux`` where that has it."""
        return super().generate(inputs, paired(images, images_aux), image_sizes, **kwargs)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Images | None = None,
        images_aux: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sizes | None = None,
    ) -> Any:
        """LLaVA's six values, with Mini-Gemini's ``images_aux`` where that has it."""
        return super().prepare_inputs_labels_for_multimodal(
            input_ids, position_ids, attention_mask, past_key_values, labels, paired(images, images_aux), image_sizes
        )

    def encode_images(self, images: Images, images_aux: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Visual tokens in the language model's width: (B, N, hidden_size) of B images.

        Raises:
            ValueError: a pixel is not finite, or an image's size is not the towers'.
        """
        return torch.stack(self.visual_tokens(paired(images, images_aux)))

    def placed_tokens(self, images: Images, image_sizes: Sizes | None = None) -> list[VisualTokens]:
        """What the language model sees of each image, with positions and sizes; all are encoded in one batch.

        Args:
            images: (B, 3, a, a), or a list of (3, a, a). What is in a list several times (questions about one image)
                is encoded once.
            image_sizes: not needed; LLaVA's callers give them.

        Returns:
            n is the number of patches, or K + M when zipped. With ``image_grid`` 2 it is so many for each tile: first
            those of the whole image (with ``image_global``), then the four quarters', row by row.

        Raises:
            ValueError: a pixel is not finite, or an image's size is not the towers'.
            TypeError: the images are not tensors.
        """
        check_images(images)
        images = list(images)  # holds them: an object's id is its own only while it lives
        first = first_places(images, None)
        used = sorted(set(first))
        pairs = [self._pair(images[index], index) for index in used]
        high = torch.stack([pair.image_aux for pair in pairs])
        tiles = torch.stack([pair.image for pair in pairs])
        for pixels in (high[:, None], tiles):  # 0 for an image that came before: the messages count all of them
            own = [pixels.shape[1] * (place == index) for index, place in enumerate(first)]
            check_finite(pixels.flatten(0, 1), own)
        tower = self.get_vision_tower()
        batch = tiles.flatten(0, 1).to(device=tower.device, dtype=tower.dtype)
        encoded = tower.encode(batch, self._project)
        keeps_cls = tower.counts is not None and tower.counts.cls_token
        tokens = encoded.tokens + self.look_closer(encoded, self.get_vision_tower_aux()(high), keeps_cls)
        encoded = replace(encoded, tokens=self._project(tokens))
        merged = dict(zip(used, encoded.split([tiles.shape[1]] * len(used)), strict=True))
        return [lay_out(merged[place], tower) for place in first]

    def whole_images(self, images: Tensor) -> Tensor:
        """What the CLIP tower sees of whole images (B, 3, a, a): (B, 3, e, e), for figures of its attention."""
        return torch.stack([self._pair(image, index).image[0] for index, image in enumerate(images)])

    def _pair(self, given: Any, index: int) -> ImagePair:
        edge, device = self.get_vision_tower().config.image_size, self.get_vision_tower_aux().device
        return pair_of(given, index, self.config, edge, device)

    def look_closer(self, encoded: EncodedImage, maps: Sequence[Tensor], keeps_cls: bool) -> Tensor:
        """Patch info mining: what is added to each token.

        Args:
            encoded: (B * T, N, D), what the CLIP tower makes of T tiles of each of B images.
            maps: the high-resolution tower's, of the B images.
            keeps_cls: the first token of each tile is CLS.

        Returns:
            (B * T, N, D).
        """
        tower, tokens = self.get_vision_tower(), encoded.tokens
        if encoded.kept is None:
            patches = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        else:  # of all but the first token, where that is CLS
            patches = encoded.kept[:, int(keeps_cls) :] - int(tower.cls_token)
        side, (grid, has_whole) = tower.num_patches_per_side, grid_of(self.config)
        size = maps[0].shape[-1] // (grid * side)  # positions along an edge of a patch
        tiles, places = (values.unflatten(0, (len(maps[0]), -1)) for values in (tokens, patches.to(maps[0].device)))
        corners = torch.stack([places // side, places % side], dim=-1) * size
        model = self.get_model()
        mined = []
        for tile in range(places.shape[1]):  # one after the other: its sub-patches are 64 times as many as its tokens
            # The whole image's patches are `grid` times as wide, and have as many sub-patches.
            is_whole = has_whole and tile == 0
            scale = grid if is_whole else 1
            row, column = divmod(tile - has_whole, grid)
            start = (0, 0) if is_whole else (row * side * size, column * side * size)
            own = sub_patches(maps, corners[:, tile] * scale + corners.new_tensor(start), size * scale, scale)
            if patches.shape[1] < tokens.shape[1]:
                extent = side * size * scale
                own = torch.cat([average_patches(maps, start, extent, size), own], dim=1)
            mined.append(
                mine(
                    tiles[:, tile],
                    own.to(tokens),
                    model.vlm_uni_query_projector,
                    model.vlm_uni_aux_projector,
                    model.vlm_uni_val_projector,
                )
            )
        return torch.stack(mined, dim=1).flatten(0, 1)


def _check_config(config: Any) -> None:
    """Check what can be known without the towers.

    Raises:
        ValueError: a field is missing, or has a value that is not supported.
    """
    required = {"mm_vision_tower": "CLIP's", "mm_vision_tower_aux": "OpenCLIP's ConvNeXt", "image_size_aux": "768"}
    for name, example in required.items():
        if not getattr(config, name, None):
            raise ValueError(f"Mini-Gemini's config.json needs {name} ({example}), but has none")
    if getattr(config, "mm_vision_select_feature", "patch") != "patch":
        raise ValueError(
            f"mm_vision_select_feature={config.mm_vision_select_feature!r} is not supported: Mini-Gemini mines for "
            "patches, use 'patch'"
        )
    if (grid := grid_of(config)[0]) not in (1, 2):
        raise ValueError(f"image_grid={grid} is not supported: Mini-Gemini's checkpoints have 1, or 2 (HD)")


def _check_sizes(config: Any, tower: VisionTower, aux: OpenCLIPVisionTower) -> None:
    """Check that both towers cut an image the same way and that the config says what they are.

    Raises:
        ValueError: they do not.
    """
    patches = tower.num_patches_per_side * grid_of(config)[0]
    if not tower.cls_token:
        raise ValueError(
            f"{type(tower).__name__} as mm_vision_tower is not supported: Mini-Gemini has CLIP, set mm_vision_tower in "
            "the checkpoint's config.json to openai/clip-vit-large-patch14-336"
        )
    if config.image_size_aux % (STRIDE * patches):
        raise ValueError(
            f"image_size_aux={config.image_size_aux} does not fit {patches} x {patches} patches: it must be a multiple "
            f"of {STRIDE * patches} (released: 768, and 1536 with image_grid=2)"
        )
    stated = getattr(config, "mm_hidden_size_aux", aux.hidden_size)
    if stated != aux.hidden_size:
        raise ValueError(
            f"mm_hidden_size_aux={stated}, but the vision tower {aux.vision_tower_name!r} has {aux.hidden_size} "
            "channels: set mm_vision_tower_aux in the checkpoint's config.json to the right one"
        )

"""From images to visual tokens: vision tower, compression, projector, and the order of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.prompts import (
    as_tiles,
    check_images,
    first_places,
)
from llava.model.tiles import Layout, tile_layouts
from llava.model.visual import VisualTokens, lay_out
from visionzip.encoder import check_finite

Images = Tensor | Sequence[Tensor] | Sequence[EncodedImage]
Sizes = Sequence[tuple[int, int]]


class ImageEncoding:
    """What a LLaVA does with images alone; mixed into its causal language model."""

    config: Any
    model: Any
    dtype: torch.dtype

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

    def encode_images(self, images: Tensor) -> Tensor:
        """Visual tokens in the language model's width: (B, N, hidden_size) of images (B, 3, h, w).

        Raises:
            ValueError: a pixel is not finite, or the images' size is not the encoder's.
        """
        check_finite(images, [1] * len(images))
        return self._encode(images, self.get_vision_tower()).tokens

    def count_markers(self, images: Images) -> int:
        """How many ``<image>`` stand for these images in a prompt."""
        return len(images)

    @property
    def frame_length(self) -> int:
        """Visual tokens of one frame of a video, not zipped."""
        return self.get_vision_tower().num_patches

    def visual_tokens(self, images: Images, image_sizes: Sizes | None = None) -> list[Tensor]:
        """What the language model sees of each image: (n, hidden_size); see :meth:`placed_tokens`."""
        return [image.tokens for image in self.placed_tokens(images, image_sizes)]

    def placed_tokens(self, images: Images, image_sizes: Sizes | None = None) -> list[VisualTokens]:
        """What the language model sees of each image, with positions and sizes; all tiles are encoded in one batch.

        Args:
            images: as in :meth:`generate`, or a list of what the tower has made of each (:class:`EncodedImage`), with
                which it is not run. What is in a list several times (questions about one image) is encoded once.
            image_sizes: (width, height) of each image, needed for tiles.

        Raises:
            ValueError: a pixel is not finite, or the tiles do not fit the image's size.
            TypeError: the images are not tensors.
        """
        check_images(images)
        tower = self.get_vision_tower()
        if isinstance(images, Tensor) and images.ndim == 4:
            check_finite(images, [1] * len(images))
            return [lay_out(image, tower) for image in self._encode(images, tower).split([1] * len(images))]
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
            whole = EncodedImage.join([encoded[index] for index in used])
            whole = replace(whole, tokens=self._project(whole.tokens))
        else:
            batch = torch.cat([tiles[index].to(tower.device) for index in used])
            check_finite(batch, counts)
            whole = self._encode(batch, tower)
        unpads = getattr(self.config, "mm_patch_merge_type", "flat") == "spatial_unpad"
        newline = self.get_model().image_newline if unpads else None
        merged = {
            index: lay_out(image, tower, layout, newline)
            for index, (image, layout) in enumerate(zip(whole.split(counts), layouts, strict=True))
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

    def _encode(self, pixels: Tensor, tower: VisionTower) -> EncodedImage:
        """What a tower makes of pixels, in the language model's width."""
        encoded = tower.encode(pixels.to(tower.dtype), self._project)  # it returns the type that it is given
        return replace(encoded, tokens=self._project(encoded.tokens))

    def _project(self, tokens: Tensor) -> Tensor:
        projector = self.get_model().mm_projector
        dtype = next((parameter.dtype for parameter in projector.parameters()), self.dtype)
        return projector(tokens.to(dtype))

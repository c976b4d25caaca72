"""Transformers' own LLaVA models (``llava-hf/…``) behind the interface that this package's commands use.

Prompts, tiles and images are LLaVA's, as its evaluation has them: texts are tokenized apart from the image sentinel,
LLaVA-1.5's images are padded to a square, LLaVA-NeXT's cut into tiles. (Transformers' processors tokenize the whole
text at once and crop where LLaVA pads.) What answers is the model as transformers loads it, zipped or not.

OneVision's images are all cut into tiles; its stock processor gives those that share a prompt with others one tile
each.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.checkpoints.layouts import KINDS, image_fields
from llava.model.llava_arch import Images, LlavaMetaForCausalLM, Sizes
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.prompts import as_tiles, check_images, first_places
from llava.model.stock.language import Language
from llava.model.tiles import tile_layouts
from llava.model.visual import VisualTokens
from llava.video import check_frames, process_videos
from visionzip import VisionZipConfig
from visionzip.encoder import check_finite
from visionzip.integrations import REGISTRY, Integration, family_of, find_integration
from visionzip.integrations.encoders import Encoder
from visionzip.integrations.generation import logits_processors


def generating_module(model: nn.Module) -> nn.Module:
    """What ``generate`` calls for each step: the model itself, or the one inside a :class:`TransformersLlava`."""
    return model.native if isinstance(model, TransformersLlava) else model


class TransformersLlava(LlavaMetaForCausalLM, Language):
    """A transformers LLaVA that takes this package's prompts and images.

    ``visionzip`` and ``unzip`` work on it as on the model inside.

    Args:
        native: a model of one of :data:`KINDS`.

    Attributes:
        native: the same.
        kind: how it takes images.
        config: of its language model, with LLaVA's fields; image sizes are (width, height) in it.
    """

    def __init__(self, native: Any) -> None:
        Language.__init__(self, native)
        # As of the in-tree models: of embeddings, the processors see new ids alone.
        native._get_logits_processor = functools.partial(logits_processors, native)
        self.kind = KINDS[native.config.model_type]
        self.config = llava_config(native.config)
        with torch.device("meta"):
            tower = build_vision_tower(self.config, delay_load=True)
        tower.vision_tower.vision_model = getattr(native.model, self.kind.tower)
        tower.is_loaded = True
        self._tower = (tower,)  # not a submodule of its own

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the model inside and the image processor, in transformers' layout."""
        self.native.save_pretrained(save_directory, **kwargs)
        self.get_vision_tower().image_processor.save_pretrained(save_directory)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.native.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.native.device

    @property
    def generation_config(self) -> Any:
        """The model's."""
        return self.native.generation_config

    @property
    def mm_projector(self) -> nn.Module:
        """From the vision tower to the language model."""
        return self.native.model.multi_modal_projector

    def _project(self, tokens: Tensor) -> Tensor:
        return self.mm_projector(tokens.to(self.dtype))

    def get_model(self) -> nn.Module:
        """The language model, without its head."""
        return self.native.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding of token ids."""
        return self.native.get_input_embeddings()

    def get_vision_tower(self) -> VisionTower:
        """The vision tower, as a view of the model's encoder with the setting that the model has now."""
        setting = getattr(self.native.config, "visionzip", None)
        self._tower[0].visionzip = VisionZipConfig.from_dict(setting) if setting else None
        return self._tower[0]

    def placed_tokens(self, images: Images, image_sizes: Sizes | None = None) -> list[VisualTokens]:
        """What the language model sees for each ``<image>``: of an image, or of a video's frame.

        Args:
            images: as in :meth:`generate`, and videos from :meth:`video_pixels`. What is in a list several times is
                encoded once.
            image_sizes: (width, height) of each image, needed for tiles.

        Raises:
            ValueError: a pixel is not finite, or the tiles do not fit the image's size.
            TypeError: the images are not tensors.
        """
        check_images(images)
        images = list(images)  # holds them: an object's id is its own only while it lives
        first = first_places(images, image_sizes)
        videos = [place for place in sorted(set(first)) if self._is_video(images[place])]
        found = {place: self._frames(images[place], place) for place in videos}
        if single := sorted(set(first) - set(videos)):
            encoded = self._encoded("image", self.pixel_inputs(images, image_sizes, single))
            found |= {place: [own] for place, own in zip(single, encoded, strict=True)}
        return [own for place in first for own in found[place]]

    def _encoded(self, name: str, pixels: dict[str, Tensor]) -> list[VisualTokens]:
        """Visual tokens of each image, or each video, whose pixels are given as the model inside takes them."""
        base, zipped = self.native.model, getattr(self.native, "_visionzip", None)
        if zipped is None:
            output = getattr(base, f"get_{name}_features")(**pixels).pooler_output
            if name == "video":  # (frames, n, hidden_size)
                output = output.flatten(0, -2)[None]
            return [VisualTokens(tokens, len(tokens)) for tokens in output]
        modality = zipped.family.modalities[name]
        encoded = modality.encode(base, zipped.config, pixels)
        runs = modality.runs(base, zipped.config, pixels)
        return [
            VisualTokens(
                tokens,
                run.full if zipped.original else len(tokens),
                places if zipped.original else None,
                encoded.sizes[index] if encoded.sizes else None,
            )
            for index, (tokens, places, run) in enumerate(zip(encoded.tokens, encoded.places, runs, strict=True))
        ]

    def count_markers(self, images: Images) -> int:
        """How many ``<image>`` stand for these images and videos in a prompt: one for each frame."""
        return sum(image.shape[1] if self._is_video(image) else 1 for image in images)

    @property
    def takes_videos(self) -> bool:
        """Whether videos may be among the images."""
        return hasattr(self.native.model, "get_video_features")

    @property
    def frame_length(self) -> int:
        """Visual tokens of one frame of a video, not zipped, and without OneVision's newline behind the last one."""
        if not self.takes_videos:  # frames are images to it
            return super().frame_length
        video = family_of(self.native).modalities["video"]
        edge = self.get_vision_tower().config.image_size
        pixels = (torch.empty(1, frames, 3, edge, edge, device="meta") for frames in (1, 2))
        one, two = (video.runs(self.native.model, VisionZipConfig(), {video.pixels: each})[0].full for each in pixels)
        return two - one

    def video_pixels(self, frames: Sequence[Image.Image], image_processor: Any) -> Tensor:
        """Frames of one video as it may be among the images.

        Of Video-LLaVA (3, T, h, w), as in-tree. Of the families with tiles, which have four dimensions too,
        (1, T, 3, h, w), as transformers' video processors make it: each frame scaled, and cut to a square or, by
        OneVision, squeezed into one. (Those scale tensors, this the PIL image: pixels differ a little.)

        Raises:
            TypeError: they are not a sequence of PIL images.
            ValueError: there are none.
        """
        if not self.kind.tiles:
            return process_videos([frames], image_processor)[0]
        check_frames(frames, "the video")
        settings = {"return_tensors": "pt"}
        if self.kind.processor is None:
            return image_processor.preprocess(list(frames), **settings)["pixel_values"][None]
        edge = self.get_vision_tower().config.image_size  # the whole image is the first of its tiles
        tiles = image_processor.preprocess(list(frames), image_grid_pinpoints=[[edge, edge]], **settings)
        return tiles["pixel_values"][None, :, 0]

    def _is_video(self, image: Any) -> bool:
        return self.takes_videos and isinstance(image, Tensor) and image.ndim == (5 if self.kind.tiles else 4)

    def _frames(self, video: Tensor, index: int) -> list[VisualTokens]:
        """Each frame of a video; the last one's with OneVision's newline behind the video."""
        tower = self.get_vision_tower()
        edge, tiled = tower.config.image_size, self.kind.tiles
        frames = video.flatten(0, 1) if tiled else video.transpose(0, 1)
        if (tiled and len(video) != 1) or frames.shape[1:] != (3, edge, edge) or len(frames) == 0:
            form = f"(1, T, 3, {edge}, {edge})" if tiled else f"(3, T, {edge}, {edge})"
            raise ValueError(
                f"images[{index}] has shape {tuple(video.shape)}: a video is {form}, as video_pixels makes it"
            )
        check_finite(frames, [0] * index + [len(frames)])
        pixels = frames[None].to(device=tower.device, dtype=tower.dtype)
        (whole,) = self._encoded("video", {"pixel_values_videos": pixels})
        return whole.split(len(frames))

    def pixel_inputs(
        self, images: Sequence[Tensor], image_sizes: Sizes | None = None, wanted: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Images as arguments of the model inside: ``pixel_values`` and, of tiles, ``image_sizes``.

        Args:
            images: as in :meth:`generate`.
            image_sizes: (width, height) of each.
            wanted: places of those that are to be in them; None takes all.

        Raises:
            ValueError: a pixel is not finite, or the tiles do not fit the image's size.
            TypeError: the images are not tensors.
        """
        tower, tiled = self.get_vision_tower(), self.kind.tiles
        edge, pinpoints = tower.config.image_size, getattr(self.config, "image_grid_pinpoints", None)
        wanted = range(len(images)) if wanted is None else wanted
        tiles = {place: as_tiles(images[place], place, edge) for place in wanted}
        if self.kind.processor and image_sizes is not None:  # it fills tiles up to the most of a batch
            for place, image in tiles.items():
                shape = get_anyres_image_grid_shape(image_sizes[place], pinpoints, edge)
                tiles[place] = image[: 1 + math.prod(shape)]
        if any((len(image) > 1) != tiled for image in tiles.values()):
            raise ValueError(
                f"images come as {[len(image) for image in tiles.values()]} tiles, but this model reads each as "
                f"{'the whole image and a grid of tiles' if tiled else 'one tile'}: prepare them with process_images"
            )
        counts = [len(tiles.get(place, ())) for place in range(len(images))]  # of all, as messages count them
        check_finite(torch.cat(list(tiles.values())), counts)
        pixels = pad_sequence(list(tiles.values()), batch_first=True).to(device=tower.device, dtype=tower.dtype)
        if not tiled:
            return {"pixel_values": pixels[:, 0]}
        tile_layouts(counts, image_sizes, pinpoints, edge)  # checks them
        sizes = [(height, width) for width, height in (image_sizes[place] for place in wanted)]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes, device=tower.device)}


def llava_config(native: PretrainedConfig) -> PretrainedConfig:
    """The language model's config with LLaVA's fields, of a transformers model's."""
    own = copy.deepcopy(native.get_text_config())
    for name, value in image_fields(native).items():
        setattr(own, name, value)
    own.mm_vision_tower = native.name_or_path
    return own


def _attach(model: TransformersLlava, config: VisionZipConfig) -> None:
    find_integration(model.native).attach(model.native, config)
    model.config.visionzip = model.native.config.visionzip


def _detach(model: TransformersLlava) -> None:
    find_integration(model.native).detach(model.native)
    vars(model.config).pop("visionzip", None)


def _encoders(model: TransformersLlava) -> dict[str, Encoder]:
    """Those of the model inside, with the image processor; videos are as :meth:`TransformersLlava.video_pixels`."""
    found = find_integration(model.native).encoders(model.native)
    processor = functools.partial(getattr, model.get_vision_tower(), "image_processor")
    found = {name: replace(encoder, processor=processor) for name, encoder in found.items()}
    if "video" in found and not model.kind.tiles:
        frames = found["video"].inputs
        found["video"] = replace(found["video"], inputs=lambda videos: frames(videos.transpose(1, 2)))
    return found


def _default(model: TransformersLlava) -> VisionZipConfig:
    return find_integration(model.native).default(model.native)


REGISTRY[f"{__name__}.{TransformersLlava.__qualname__}"] = Integration(
    "transformers' models in LLaVA's commands", _attach, _detach, _encoders, _default, generating_module
)

"""Video-LLaVA: images and videos for one Llama, through two LanguageBind encoders and one projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.llava_arch import Images, LlavaMetaForCausalLM, LlavaMetaModel, Sizes
from llava.model.multimodal_encoder.languagebind import LanguageBindImageTower, LanguageBindVideoTower
from llava.model.prompts import check_images, first_places
from llava.model.visual import VisualTokens, lay_out
from llava.video import process_videos
from visionzip.encoder import check_finite


class VideoLlavaLlamaConfig(LlamaConfig):
    """Llama's config and Video-LLaVA's fields (``mm_image_tower``, ``mm_video_tower``, …)."""

    model_type = "video_llava_llama"


class VideoLlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama with an image and a video tower."""

    config_class = VideoLlavaLlamaConfig

    def get_vision_tower(self) -> LanguageBindImageTower | None:
        """The image tower, by the name that it has in other LLaVAs."""
        return getattr(self, "image_tower", None)


class VideoLlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    """Video-LLaVA, which takes images (3, h, w) and videos (3, T, h, w), also in one prompt and in one batch.

    ``images`` is a list of both, (N, 3, h, w) or (N, 3, T, h, w). A prompt has one ``<image>`` for each image and one
    for each frame of a video. For the rest see :class:`llava.model.llava_arch.LlavaMetaForCausalLM`.
    """

    config_class = VideoLlavaLlamaConfig
    backbone_class = VideoLlavaLlamaModel
    takes_videos = True

    def get_image_tower(self) -> LanguageBindImageTower:
        """The tower that encodes images."""
        return self.model.image_tower

    def get_video_tower(self) -> LanguageBindVideoTower:
        """The tower that encodes videos."""
        return self.model.video_tower

    @property
    def frame_length(self) -> int:
        """Visual tokens of one frame of a video, not zipped."""
        return self.get_video_tower().num_patches

    def video_pixels(self, frames: Sequence[Image.Image], image_processor: Any) -> Tensor:
        """Frames of one video as it may be among the images: see :func:`llava.video.process_videos`."""
        return process_videos([frames], image_processor)[0]

    def encode_videos(self, videos: Tensor) -> Tensor:
        """Visual tokens in the language model's width: (B, T, N, hidden_size) of videos (B, 3, T, h, w).

        Raises:
            ValueError: a pixel is not finite, or the videos' size is not the encoder's.
        """
        check_finite(videos, [1] * len(videos))
        return self._encode(videos, self.get_video_tower()).tokens

    def placed_tokens(self, images: Images, image_sizes: Sizes | None = None) -> list[VisualTokens]:
        """What the language model sees for each ``<image>``: an image, or a video's frame.

        Images are encoded in one batch, and so are videos of one length. What is in a list several times is encoded
        once.

        Args:
            images: as in :meth:`generate`.
            image_sizes: not needed, as there are no tiles.

        Raises:
            ValueError: there are none, one has another shape than the towers take, or a pixel is not finite.
            TypeError: one is not a tensor.
        """
        check_images(images)
        images = list(images)  # holds them: an object's id is its own only while it lives
        edge = self.get_image_tower().config.image_size
        for index, image in enumerate(images):
            _check_shape(image, index, edge)
        places = first_places(images, None)
        found: dict[int, list[VisualTokens]] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            members = [index for index in sorted(set(places)) if images[index].shape == shape]
            tower = self.get_image_tower() if len(shape) == 3 else self.get_video_tower()
            batch = torch.stack([images[index].to(tower.device) for index in members])
            # 0 for the others, so that the messages count all of them
            check_finite(batch, [int(index in members) for index in range(len(images))])
            encoded = self._encode(batch, tower)
            for index, own in zip(members, encoded.split([1] * len(members)), strict=True):
                frames = own if len(shape) == 3 else own.flatten()
                found[index] = [lay_out(frame, tower) for frame in frames.split([1] * len(frames.tokens))]
        return [frame for place in places for frame in found[place]]

    def count_markers(self, images: Images) -> int:
        """How many ``<image>`` stand for these images and videos in a prompt.

        Raises:
            ValueError: one has another shape than the towers take.
            TypeError: one is not a tensor.
        """
        edge = self.get_image_tower().config.image_size
        return sum(_check_shape(image, index, edge) for index, image in enumerate(images))


def _check_shape(image: Any, index: int, edge: int) -> int:
    """Check one image (3, edge, edge) or video (3, T, edge, edge); returns how many ``<image>`` it takes: 1 or T."""
    if not isinstance(image, Tensor):
        raise TypeError(
            f"images[{index}] is a {type(image).__name__}, not a tensor: prepare images with "
            "llava.mm_utils.process_images and videos with llava.video.process_videos"
        )
    shape = tuple(image.shape)
    if len(shape) not in (3, 4) or shape[0] != 3 or shape[-2:] != (edge, edge) or 0 in shape:
        raise ValueError(
            f"images[{index}] has shape {shape}: for these towers an image is (3, {edge}, {edge}) and a video "
            f"(3, T, {edge}, {edge}), in a list or with a batch axis in front (images[None])"
        )
    return 1 if len(shape) == 3 else shape[1]


AutoConfig.register("video_llava_llama", VideoLlavaLlamaConfig)
AutoModelForCausalLM.register(VideoLlavaLlamaConfig, VideoLlavaLlamaForCausalLM)

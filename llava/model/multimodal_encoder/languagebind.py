"""LanguageBind's image and video encoders, as Video-LLaVA has them: CLIP, and for videos attention over time too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, PreTrainedModel
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from llava.model.checkpoints.files import find_file
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.encoded_image import EncodedImage


class LanguageBindVideoConfig(CLIPVisionConfig):
    """CLIP's fields and two of LanguageBind's; its other ones (``lora_r``, ``force_patch_dropout``, …) are training's.

    Attributes:
        add_time_attn: each layer attends over time first.
        num_frames: frames that attend to each other; rows of each layer's ``temporal_embedding``.
    """

    add_time_attn: bool = False
    num_frames: int = 1


class TemporalEncoderLayer(CLIPEncoderLayer):
    """transformers' CLIP layer, and before it attention of each patch to itself in the other frames.

    Longer videos are cut into windows of ``num_frames`` consecutive frames, and each frame attends to those of its own
    window: what the released code does with any multiple of ``num_frames``, and what the embedding was trained for. A
    last window may be shorter.
    """

    def __init__(self, config: LanguageBindVideoConfig) -> None:
        super().__init__(config)
        self.num_frames = config.num_frames
        self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, frames: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Attend over time, then over space.

        Args:
            hidden_states: (B * T, S, D), the frames of B videos.
            attention_mask: None.
            frames: T; None is ``num_frames``.
            **kwargs: as in transformers.

        Returns:
            (B * T, S, D).
        """
        videos = hidden_states.unflatten(0, (-1, frames or self.num_frames))
        rest = videos.shape[1] % self.num_frames
        whole, last = videos.split([videos.shape[1] - rest, rest], dim=1)
        parts = []
        if whole.shape[1]:
            windows = whole.unflatten(1, (-1, self.num_frames)).flatten(0, 1)
            parts.append(self._attend_over_time(windows).unflatten(0, (len(videos), -1)).flatten(1, 2))
        if rest:
            parts.append(self._attend_over_time(last))
        return super().forward(torch.cat(parts, dim=1).flatten(0, 1), attention_mask, **kwargs)

    def _attend_over_time(self, windows: Tensor) -> Tensor:
        """Of windows (W, t, S, D), t at most ``num_frames``."""
        tokens = windows.shape[2]
        if self.num_frames > 1:  # as released: encoders of single frames do not use theirs
            windows = windows + self.temporal_embedding[:, : windows.shape[1], None]
        by_patch = self.temporal_layer_norm1(windows).transpose(1, 2).flatten(0, 1)
        attended, _ = self.temporal_attn(by_patch)
        return windows + attended.unflatten(0, (-1, tokens)).transpose(1, 2)


class LanguageBindImageModel(CLIPVisionModel):
    """CLIP; a class of its own, for which transformers does not rename the weights of a whole Video-LLaVA."""


class LanguageBindVideoModel(LanguageBindImageModel):
    """CLIP with :class:`TemporalEncoderLayer`, where the config's ``add_time_attn`` says so."""

    config_class = LanguageBindVideoConfig

    def __init__(self, config: LanguageBindVideoConfig) -> None:
        super().__init__(config)
        if config.add_time_attn:
            self.encoder.layers = nn.ModuleList(TemporalEncoderLayer(config) for _ in range(config.num_hidden_layers))
            self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TemporalEncoderLayer):
            init.normal_(module.temporal_embedding, std=self.config.hidden_size**-0.5)


class LanguageBindImageProcessor(CLIPImageProcessorPil):
    """CLIP's, with the released code's scaling: bicubic, of unrounded values, and without smoothing.

    The released code scales tensors with torchvision 0.15, which does not smooth them; CLIP's own processor (and that
    of transformers' VideoLlava) scales with PIL, which does. Source: LanguageBind's ``processing_image.py``, and the
    versions that Video-LLaVA pins.
    """

    def resize(self, image: np.ndarray, size: Any, resample: Any = None, **kwargs: Any) -> np.ndarray:
        """An image (3, height, width) with its short side at ``size.shortest_edge``: (3, h, w) float32."""
        short = min(image.shape[-2:])
        target = tuple(int(size.shortest_edge * length / short) for length in image.shape[-2:])
        values = torch.from_numpy(image).float()
        return F.interpolate(values[None], size=target, mode="bicubic", align_corners=False)[0].numpy()

    def center_crop(self, image: np.ndarray, size: Any, **kwargs: Any) -> np.ndarray:
        """The middle of an image (3, h, w), by torchvision's rounding: half a pixel goes to the even side."""
        height, width = image.shape[-2:]
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]


class LanguageBindImageTower(CLIPVisionTower):
    """``LanguageBind/LanguageBind_Image``: CLIP ViT-L/14 at 224 pixels, 256 patches without the CLS token."""

    model_class = LanguageBindImageModel
    processor_class = LanguageBindImageProcessor
    config_key = "mm_image_config"
    key_mapping = {r"^vision_model\.": ""}  # noqa: RUF012 - as in LanguageBind's folders
    encoder_prefix = "image_tower."

    def _set_encoder(self, encoder: PreTrainedModel) -> None:
        self.image_tower = encoder

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder, a transformers model."""
        return self.image_tower

    def _load_image_processor(self) -> Any:
        # LanguageBind's own file is not read by the released code either, and some of its folders have none.
        if find_file(self._checkpoint, "preprocessor_config.json"):
            return self.processor_class.from_pretrained(self._checkpoint)
        return self.default_processor()


class LanguageBindVideoTower(LanguageBindImageTower):
    """``LanguageBind/LanguageBind_Video_merge``: 8 frames of 257 tokens, the CLS token included.

    The released code passes the CLS token on (2056 tokens), the papers count without it (2048):
    ``mm_video_select_feature`` is ``"cls_patch"`` (if absent) or ``"patch"``.
    """

    model_class = LanguageBindVideoModel
    config_class = LanguageBindVideoConfig
    config_key = "mm_video_config"
    encoder_prefix = "video_tower."
    feature_key, default_feature = "mm_video_select_feature", "cls_patch"

    def _set_encoder(self, encoder: PreTrainedModel) -> None:
        self.video_tower = encoder

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder, a transformers model."""
        return self.video_tower

    def forward(self, videos: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Visual tokens of each frame before the projector.

        Args:
            videos: (B, 3, T, h, w) with any number of frames T, or a list of (3, T, h, w).

        Returns:
            (B, T, N, D) in the videos' type: all tokens, or K + M of each frame when zipped; a list of (1, T, N, D) for
            a list.

        Raises:
            ValueError: there are no videos, they have no frames, or not the encoder's size.
        """
        if isinstance(videos, list):
            return [self.forward(video[None]) for video in videos]
        return super().forward(videos).unflatten(0, (len(videos), -1))

    def encode(self, images: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> EncodedImage:
        """Visual tokens (B, T, N, D) of the T frames of videos (B, 3, T, h, w)."""
        encoded = super().encode(images, project)
        return encoded if encoded.kept is None else encoded.unflatten(len(images))

    def encoder_inputs(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Frames (B * T, 3, h, w) of videos (B, 3, T, h, w), and T for the layers that attend over time."""
        edge = self.config.image_size
        if images.ndim != 5 or not images.numel() or images.shape[1] != 3 or tuple(images.shape[3:]) != (edge, edge):
            raise ValueError(
                f"the video tower takes videos of shape (B, 3, T, {edge}, {edge}) with B and T >= 1, got "
                f"{tuple(images.shape)}: prepare their frames with llava.video.process_videos"
                + (", and give an image to the image tower" if images.ndim == 4 else "")
            )
        over_time = {"frames": images.shape[2]} if self.config.add_time_attn else {}
        return images.transpose(1, 2).flatten(0, 1), over_time

"""VisionZip on transformers' video families in plain code: features of images and videos. The tests' reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hf_plain import Run, plain_encode, plain_tiles, plain_zip
from torch import Tensor

K, M = 4, 2
GRIDS = {(90, 60): 2, (60, 90): 1, (90, 90): 2, (300, 90): 3}  # columns of tiles for images of (width, height)
TILES = {(90, 60): 3, (60, 90): 3, (90, 90): 5, (300, 90): 4}  # the whole image included

Size = tuple[int, int]
Features = dict[str, list[Run]]
"""What takes the place of each run of placeholders, of ``images`` and of ``videos``, in their order."""


def next_video_features(model: Any, inputs: Any, sizes: Sequence[Size]) -> Features:
    """LLaVA-NeXT-Video: tiles of images; patches of frames are pooled first, and so are their scores and keys."""
    tower, project = model.model.vision_tower, model.model.multi_modal_projector
    mode, side = model.config.spatial_pool_mode, 6
    images, videos = [], []
    full = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    for run, tiles, size in zip(full, inputs["pixel_values"], sizes, strict=True):
        zipped = plain_zip(*plain_encode(tower, tiles[: TILES[size]]), K, M)
        images.append((len(run), project(plain_tiles(zipped, GRIDS[size], side, M))))
    for frames in inputs["pixel_values_videos"]:
        tokens = []
        for hidden, score, key in zip(*plain_encode(tower, frames), strict=True):
            patches = (
                model.model.vision_resampler(hidden[None, 1:])[0] if mode == "conv" else _windows(hidden[1:], mode)
            )
            states, keys = torch.cat([hidden[:1], patches]), torch.cat([key[:1], _windows(key[1:])])
            zipped = plain_zip(states[None], _windows(score[:, None]).T, keys[None], K, M)
            tokens.append(project(zipped[0][0]))
        videos.append((9 * len(frames), torch.cat(tokens)))
    return {"images": images, "videos": videos}


def _windows(patches: Tensor, mode: str = "average") -> Tensor:
    """Windows of 2 x 2 of the 6 x 6 patches (N, D), one by one."""
    grid = patches.view(6, 6, -1)
    windows = [grid[y : y + 2, x : x + 2].flatten(0, 1) for y in range(0, 5, 2) for x in range(0, 5, 2)]
    return torch.stack([window.amax(0) if mode == "max" else window.mean(0) for window in windows])


def onevision_features(model: Any, inputs: Any, sizes: Sequence[Size | None]) -> Features:
    """LLaVA-OneVision: tiles without CLS; frames are pooled behind the projector; a newline ends each video.

    A size is None for one of several images of a sample, which stays in one tile.
    """
    tower, project, newline = model.model.vision_tower, model.model.multi_modal_projector, model.model.image_newline
    side = 5
    images, videos = [], []
    for index, size in enumerate(sizes):
        tiles = inputs["pixel_values"][index]
        tiles = tiles[: TILES[size] if size else 1]
        zipped = plain_zip(*plain_encode(tower, tiles, -1), K, M)
        if size is None:
            images.append((side * side + 1, torch.cat([project(zipped[0][0]), newline[None]])))
        else:
            run = model.get_image_features(tiles[None], inputs["image_sizes"][index : index + 1]).pooler_output[0]
            images.append((len(run), project(plain_tiles(zipped, GRIDS[size], side, M, False))))
    for frames in inputs.get("pixel_values_videos", ()):
        tokens = []
        for hidden, score, key in zip(*plain_encode(tower, frames, -1), strict=True):
            grid = _interpolated(project(hidden))[None]
            tokens.append(plain_zip(grid, _interpolated(score[:, None]).T, _interpolated(key)[None], K, M)[0][0])
        videos.append((9 * len(frames) + 1, torch.cat([*tokens, newline[None]])))
    return {"images": images, "videos": videos}


def _interpolated(patches: Tensor) -> Tensor:
    """The model's pooling of one frame's 5 x 5 patches (N, D) to 3 x 3."""
    grid = patches.T.reshape(1, -1, 5, 5)
    return torch.nn.functional.interpolate(grid, size=(3, 3), mode="bilinear")[0].flatten(1).T


def video_llava_features(model: Any, inputs: Any, sizes: Sequence[Size]) -> Features:
    """VideoLlava: images without tiles, whatever their sizes; frames of videos as they are, by a tower of their own."""

    def zipped(tower: Any, pixels: Tensor) -> list[Tensor]:
        encoded = plain_encode(tower, pixels)
        return [model.model.multi_modal_projector(tokens) for tokens, _ in plain_zip(*encoded, K, M)]

    images = zipped(model.model.image_tower, inputs["pixel_values_images"])
    videos = [zipped(model.model.video_tower, frames) for frames in inputs["pixel_values_videos"]]
    return {  # placeholders that the stock processor writes: the frames of a video keep CLS
        "images": [(16, tokens) for tokens in images],
        "videos": [(17 * len(frames), torch.cat(frames)) for frames in videos],
    }


@dataclass(frozen=True)
class PlainFamily:
    """A family of ``hf_video_models``, and what of it differs for the plain method."""

    edge: int  # of an image, tile or frame, in pixels
    features: Callable[[Any, Any, Sequence[Any]], Features]
    newline: int = 0  # a token behind each video
    tiled: bool = True
    other: dict[str, Any] = field(
        default_factory=lambda: {"num_additional_image_tokens": 0}
    )  # counts placeholders wrong


PLAIN = {
    "next_video": PlainFamily(84, next_video_features),
    "onevision": PlainFamily(70, onevision_features, newline=1, other={"vision_aspect_ratio": "anyres_max_2"}),
    "video_llava": PlainFamily(56, video_llava_features, tiled=False),
}

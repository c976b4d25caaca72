"""The family LLaVA-OneVision of transformers: SigLIP, which has no CLS token, tiles, and frames that are pooled.

An image that is alone in its prompt has tiles, which are read in the order of LLaVA-NeXT. One of several images has a
single tile and keeps its trailing newline. If there are more than nine tiles, the uncompressed model interpolates their
patches to as many as nine tiles have (``anyres_max_9``). Zipped tiles are not interpolated, as chosen tokens form no
grid: every tile has K + M tokens, however many tiles there are.

Each frame of a video is compressed alone, after the model's own pooling (27 x 27 to 14 x 14 patches, behind the
projector), and the newline at the video's end stays. Projected patches, scores and keys are pooled alike, so that kept
tokens are tokens of the uncompressed model, and merged ones are means of such tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens, read_encoder, side_length
from visionzip.integrations.encoders import Pooling
from visionzip.integrations.huggingface import Arguments, Encoded, Modality
from visionzip.integrations.prompts.runs import Run
from visionzip.integrations.towers.base import TowerFamily, check_layer, full_length, short_counts
from visionzip.integrations.towers.llava_next import (
    Grid,
    Layout,
    check_tiles,
    encode_tiles,
    grids,
    layout,
    tile_count,
    unpadded,
)
from visionzip.integrations.towers.pooled_videos import pooled_videos
from visionzip.methods import EncoderRead


def image_runs(base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> list[Run]:
    """Count each image's placeholders: K + M for each tile, or K + M + 1 for a single tile with its newline."""
    shapes = _checked_grids(base, arguments)
    tower, runs = base.vision_tower, []
    short = short_counts(tower, config).total
    for size, grid in zip(arguments["image_sizes"], shapes, strict=True):
        full = len(_packed(base, arguments, size, grid)[0])
        runs.append(Run(full, tile_count(grid) * short + (grid is None)))
    return runs


def encode_images(base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> Encoded:
    """Choose each image's tokens (tiles * (K + M), hidden_size), or (K + M + 1, hidden_size) of a single tile."""
    shapes = _checked_grids(base, arguments)
    sizes = arguments["image_sizes"]
    layouts = [_layout(base, arguments, size, grid) for size, grid in zip(sizes, shapes, strict=True)]
    return encode_tiles(base, config, arguments, shapes, layouts)


def _checked_grids(base: nn.Module, arguments: Arguments) -> list[Grid | None]:
    """Compute (rows, columns) of each image's tiles; None for an image that shares its prompt with others.

    Raises:
        ValueError: pixels, sizes and numbers of images do not fit together.
    """
    check_layer(base, arguments)
    numbers = arguments.get("batch_num_images")
    check_tiles(arguments["pixel_values"], arguments.get("image_sizes"), base.vision_tower)
    sizes = arguments["image_sizes"]
    alone = [True] * len(sizes)
    if numbers is not None:
        numbers = [int(number) for number in numbers]
        alone = [number == 1 for number in numbers for _ in range(number)]
        if len(alone) != len(sizes):
            raise ValueError(
                f"batch_num_images={numbers} are {len(alone)} images, but image_sizes has {len(sizes)}: pass all that "
                "the processor returned"
            )
    return [grid if own else None for grid, own in zip(grids(base, sizes), alone, strict=True)]


def _packed(base: nn.Module, arguments: Arguments, size: Any, grid: Grid | None) -> Tensor:
    """Apply the model's own unpadding and shrinking to tensors without content: (1, placeholders, 1)."""
    patches = full_length(base, base.vision_tower, arguments)
    return base.pack_image_features(
        [torch.empty(tile_count(grid), patches, 1, device="meta")],
        [[int(pixels) for pixels in size]],
        image_newline=torch.empty(1, device="meta"),
        vision_aspect_ratio=_aspect_ratio(base, arguments),
    )[0]


def _aspect_ratio(base: nn.Module, arguments: Arguments) -> str:
    return arguments.get("vision_aspect_ratio") or base.config.vision_aspect_ratio


def _layout(base: nn.Module, arguments: Arguments, size: Any, grid: Grid | None) -> Layout | None:
    if grid is None:
        return None
    side, limit = side_length(base.vision_tower), int(_aspect_ratio(base, arguments).removeprefix("anyres_max_"))
    left = unpadded(base, (int(size[0]), int(size[1])), grid)
    ratio = math.sqrt(left.numel() / (limit * side**2))
    # The model's own rule leaves a little more than the limit unchanged.
    shrunk = (int(left.shape[0] // ratio), int(left.shape[1] // ratio)) if ratio > 1.1 else None
    return layout(left, grid, side, shrunk)[0]


def pooled_patches(base: nn.Module) -> int:
    """Count the patches of a frame after pooling, such as 14 x 14 of 27 x 27."""
    return math.ceil(side_length(base.vision_tower) / 2) ** 2


def choose_pooled(base: nn.Module, frames: Tensor, config: VisionZipConfig) -> tuple[Tensor, CompressedTokens]:
    """Choose tokens of frames (F, 3, h, w) among projected and pooled patches."""
    read: EncoderRead = read_encoder(base.vision_tower, frames, config)

    def pool(tokens: Tensor) -> Tensor:
        first = int(read.cls_token)
        return torch.cat([tokens[:, :first], _pool(base, tokens[:, first:])], dim=1)

    pooled = read.replace(
        hidden_states=pool(base.multi_modal_projector(read.hidden_states)),
        scores=_pool(base, read.scores[..., None])[..., 0] if read.has("scores") else None,
        keys=pool(read.keys) if read.has("keys") else None,
        grid=(math.isqrt(pooled_patches(base)),) * 2,
    )
    compressed = choose_tokens(pooled.replace(projected=pooled.patches), config)
    return compressed.tokens, compressed


def _pool(base: nn.Module, values: Tensor) -> Tensor:
    return base.apply_pooling(values)


LLAVA_ONEVISION = TowerFamily(
    {
        "image": Modality("pixel_values", image_runs, encode_images),
        "video": pooled_videos(Pooling(pooled_patches, _pool, choose_pooled), newline=True),
    },
    needs=(
        "config.image_grid_pinpoints",
        "config.vision_aspect_ratio",
        "image_newline",
        "pack_image_features",
        "apply_pooling",
    ),
    tiles=True,
)

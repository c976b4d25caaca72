"""The families of the seam: how their encoders are read, and how many tokens a run of placeholders has.

A new family that is built like one of these takes one line at the end of this file, and one in the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from visionzip.attention import (
    QueriesKeys,
    merge_keys,
    patch_attention,
    patch_scores,
    read_attention,
    read_packed_attention,
)
from visionzip.integrations.huggingface import Arguments
from visionzip.integrations.seam.base import (
    Encoder,
    Frames,
    Scored,
    SeamFamily,
    all_layers,
    modality,
)
from visionzip.integrations.seam.choice import shown
from visionzip.integrations.seam.pairs import of_tokens, packed_attention

# --- encoders for pictures of any size, whose patches lie in one packed sequence: Qwen-VL's and GLM-V's ---


def token_merger(encoder: nn.Module, grid: Tensor) -> Callable[[Tensor], Tensor]:
    """Make what averages values of packed patches, such as scores or keys, over the patches of each token.

    Args:
        encoder: Qwen-VL's or GLM-V's, of transformers or of vLLM.
        grid: (n, 3), the (frames, rows, columns) of patches of each image or video.

    Returns:
        A function of values (S, ...) of the patches, in the order in which the encoder has them. It returns (N, ...) of
        the tokens in raster order.
    """
    edge, order = encoder.spatial_merge_size, None
    if hasattr(encoder, "window_size"):  # the encoder's sequence is in the order of its windows
        shape = {"window_size": encoder.window_size, "patch_size": encoder.patch_size}
        order = get_vision_window_index(grid, spatial_merge_size=edge, **shape)[0].argsort()

    def merge(values: Tensor) -> Tensor:
        merged = values.unflatten(0, (-1, edge**2)).mean(dim=1)
        return merged if order is None else merged[order]

    return merge


@contextmanager
def _read_packed(name: str, base: nn.Module, layer: int, arguments: Arguments) -> Iterator[Scored]:
    merge = token_merger(base.visual, arguments[name])
    with read_packed_attention(base.visual.blocks[layer].attn) as found:
        yield lambda: (merge(found[0][0]), merge(found[0][1]))


@contextmanager
def _packed_pairs(base: nn.Module, layer: int, arguments: Arguments) -> Iterator[Callable[[], Tensor]]:
    merge = token_merger(base.visual, arguments["image_grid_thw"])
    with read_packed_attention(base.visual.blocks[layer].attn, packed_attention) as found:
        yield lambda: of_tokens(merge, found[0], base.visual.spatial_merge_size**2)


def _packed_layers(base: nn.Module) -> list[int]:
    """List the layers whose attention is not limited to windows, counted from the end."""
    depth = len(base.visual.blocks)
    return [layer - depth for layer in getattr(base.visual, "fullatt_block_indexes", range(depth))]


def _grid_frames(name: str, pixels: str, base: nn.Module, arguments: Arguments) -> list[Frames]:
    """By ``image_grid_thw``.

    Raises:
        ValueError: it is missing, or is of other pixels.
    """
    if (grid := arguments.get(name)) is None:
        raise ValueError(f"{name} must have (frames, rows, columns) of each: pass all that the processor returned")
    shape, patch = tuple(arguments[pixels].shape), base.visual.patch_embed
    wanted = (int(grid.prod(dim=1).sum()), patch.in_channels * patch.temporal_patch_size * patch.patch_size**2)
    if shape != wanted:
        raise ValueError(
            f"{pixels} must be {wanted} for this model and {name} {grid.tolist()}, got {shape}: pass all that the "
            "model's own processor returned"
        )
    merge = base.visual.spatial_merge_size
    return [Frames(count, (rows // merge, columns // merge)) for count, rows, columns in grid.tolist()]


def grid_family(timestamps: bool = False, videos: bool = True) -> SeamFamily:
    """Define a family like Qwen-VL: pictures of any size, a merger behind the encoder, and M-RoPE.

    Args:
        timestamps: whether each frame of a video has a run of placeholders of its own.
        videos: whether videos have placeholders of their own kind, so that they can be compressed.
    """
    modalities = {}
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos"))[: 1 + videos]:
        grid = f"{name}_grid_thw"
        encoder = Encoder(partial(_read_packed, grid), _packed_layers)
        apart = timestamps and name == "video"
        modalities[name] = modality(name, pixels, partial(_grid_frames, grid, pixels), encoder, apart)
    images = Encoder(partial(_read_packed, "image_grid_thw"), _packed_layers, pairs=_packed_pairs)
    frames = partial(_grid_frames, "image_grid_thw", "pixel_values")
    return SeamFamily(modalities, encoder=images, frames=frames, rotary=True)


# --- encoders for pictures of one size ---


@contextmanager
def _read_square(
    blocks: str, attention: str, cls_token: bool, base: nn.Module, layer: int, arguments: Arguments
) -> Iterator[Scored]:
    def summarize(read: QueriesKeys) -> tuple[Tensor, Tensor]:
        return patch_scores(read, cls_token), merge_keys(read)[:, int(cls_token) :]

    def tokens() -> tuple[Tensor, Tensor]:
        scores, keys = reader.result()
        pooled = _square_pool(base, torch.cat([scores[..., None], keys], dim=-1)).flatten(0, 1)
        return pooled[:, 0], pooled[:, 1:]

    with read_attention(getattr(attrgetter(blocks)(base)[layer], attention), summarize) as reader:
        yield tokens


def _square_pool(base: nn.Module, values: Tensor) -> Tensor:
    """Average values (B, S, C) of the patches of pictures over those of each token: (B, N, C)."""
    patches = int(values.shape[1] ** 0.5)
    return F.avg_pool2d(values.mT.unflatten(-1, (patches, patches)), patches // _side(base)).flatten(2).mT


@contextmanager
def _square_pairs(
    blocks: str, attention: str, cls_token: bool, base: nn.Module, layer: int, arguments: Arguments
) -> Iterator[Callable[[], Tensor]]:
    """Of tiles that of the last one, which shows the whole picture."""

    def tokens() -> Tensor:
        pairs = reader.result()
        patches = pairs.shape[-1] // _side(base) ** 2
        return of_tokens(partial(_square_pool, base), pairs[-1:], patches)[0]

    on_patches = partial(patch_attention, cls_token=cls_token)
    with read_attention(getattr(attrgetter(blocks)(base)[layer], attention), on_patches) as reader:
        yield tokens


def _side(base: nn.Module) -> int:
    """Count the tokens along one edge of a picture, from whichever entry the family's config has."""
    config = base.config
    edge = config.vision_config.image_size
    patches = _first(edge) // _first(config.vision_config.patch_size)
    if (tokens := getattr(config, "mm_tokens_per_image", None)) is not None:
        return int(tokens**0.5)
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:
        return int(patches * ratio)
    return patches // getattr(config, "scale_factor", 1)


def _first(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _square_frames(base: nn.Module, arguments: Arguments) -> list[Frames]:
    """Return one frame for each picture.

    Raises:
        ValueError: the pictures do not have the model's size.
    """
    pixels, edge = arguments["pixel_values"], _first(base.config.vision_config.image_size)
    if pixels.ndim not in (4, 5) or tuple(pixels.shape[-3:]) != (3, edge, edge):
        raise ValueError(
            f"pixel_values must be (N, 3, {edge}, {edge}) for this model, got {tuple(pixels.shape)}: prepare "
            "the inputs with the model's own processor"
        )
    count = len(pixels) if pixels.ndim == 4 else int(shown(pixels).sum())
    return [Frames(1, (_side(base),) * 2)] * count


def square_family(
    blocks: str, attention: str = "self_attn", cls_token: bool = False, stacked: bool = True, **options: Any
) -> SeamFamily:
    """Define a family whose pictures have one size, and one run of placeholders each.

    Args:
        blocks: the dotted name of the base model's attribute that holds the encoder's layers.
        attention: the attribute of a layer that :func:`visionzip.attention.read_attention` can read.
        cls_token: whether the encoder has a CLS token, which is part of no token of the language model.
        stacked: whether the model takes the tokens as one tensor, as in :class:`Modality`.
        **options: other attributes of :class:`SeamFamily`.
    """
    place = (blocks, attention, cls_token)
    encoder = Encoder(partial(_read_square, *place), partial(all_layers, blocks), pairs=partial(_square_pairs, *place))
    image = modality("image", "pixel_values", _square_frames, encoder, stacked=stacked)
    return SeamFamily({"image": image}, encoder=encoder, frames=_square_frames, side=_side, **options)


QWEN_VL = grid_family()  # 2 and 2.5
QWEN3_VL = grid_family(timestamps=True)  # also MoE, and 3.5
GLM4V = grid_family(videos=False)  # its videos have the placeholders of images
INTERNVL = square_family("vision_tower.encoder.layer", "attention", cls_token=True)
GEMMA3 = square_family("vision_tower.encoder.layers")
IDEFICS3 = square_family("vision_model.encoder.layers", stacked=False, backbone="text_model")  # and SmolVLM

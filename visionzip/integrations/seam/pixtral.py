"""The families with Pixtral's encoder, Mistral 3 and Pixtral-12B: pictures of any size in one packed sequence.

The processor writes placeholders row by row, with a token after each row: ``[IMG_BREAK]``, or ``[IMG_END]`` after the
last one. All of these stay, even after a row of which no token is kept, because their number before a token tells the
language model the token's row. So a picture of 36 rows takes 36 tokens more than are kept of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.attention import packed_scores, read_parts
from visionzip.integrations.huggingface import Arguments
from visionzip.integrations.seam.base import Encoder, Frames, Scored, SeamFamily, all_layers, modality
from visionzip.integrations.seam.pairs import of_tokens, packed_attention

Pool = Callable[[Tensor], Tensor]


@contextmanager
def _reading(
    reduce: Callable[..., Any], base: nn.Module, layer: int, arguments: Arguments
) -> Iterator[tuple[list[Any], Pool]]:
    """Yield what ``reduce`` makes of all patches, and what averages values (S, C) of them over those of each token."""
    attention, merge = base.vision_tower.transformer.layers[layer].attention, _merge(base)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    cells = [frames.size for frames in _frames(base, arguments)]
    sizes = [
        (height // base.vision_tower.patch_size, width // base.vision_tower.patch_size)
        for height, width in _sizes(arguments)
    ]

    def reduced(outputs: dict[str, Tensor], given: dict[str, Any]) -> Any:
        pair = (outputs[name].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        queries, keys = pair  # (1, H, S, Dh)
        turned = rotate(queries, keys, *given["position_embeddings"], unsqueeze_dim=0)
        return reduce(turned[0][0], turned[1][0], keys[0], [y * x for y, x in sizes], attention.scaling)

    def pool(values: Tensor) -> Tensor:
        fields = values.split([y * x for y, x in sizes])
        pooled = []
        for field, size, (rows, columns) in zip(fields, sizes, cells, strict=True):
            whole = field.unflatten(0, size)[: rows * merge, : columns * merge]
            pooled.append(
                whole.unflatten(1, (columns, merge)).unflatten(0, (rows, merge)).mean(dim=(1, 3)).flatten(0, 1)
            )
        return torch.cat(pooled)

    with read_parts(attention, ("q_proj", "k_proj"), reduced) as found:
        yield found, pool


@contextmanager
def _read(base: nn.Module, layer: int, arguments: Arguments) -> Iterator[Scored]:
    with _reading(packed_scores, base, layer, arguments) as (found, pool):
        yield lambda: (pool(found[0][0][:, None])[:, 0], pool(found[0][1]))


@contextmanager
def _pairs(base: nn.Module, layer: int, arguments: Arguments) -> Iterator[Callable[[], Tensor]]:
    with _reading(packed_attention, base, layer, arguments) as (found, pool):
        yield lambda: of_tokens(pool, found[0], _merge(base) ** 2)


def _merge(base: nn.Module) -> int:
    """Count the patches along one edge of a token: 1 in Pixtral-12B, 2 in Mistral 3."""
    return getattr(base.config, "spatial_merge_size", 1)


def _sizes(arguments: Arguments) -> list[tuple[int, int]]:
    """List the height and width of each picture."""
    return [(int(height), int(width)) for height, width in torch.as_tensor(arguments["image_sizes"]).tolist()]


def _frames(base: nn.Module, arguments: Arguments) -> list[Frames]:
    """Return one frame for each picture, from ``image_sizes``.

    Raises:
        ValueError: the sizes are missing, do not fit the pixels, or are of fewer tokens than the stock model takes.
    """
    pixels, edge = arguments["pixel_values"], base.vision_tower.patch_size * _merge(base)
    if arguments.get("image_sizes") is None:
        raise ValueError("image_sizes must have (height, width) of each picture: pass all that the processor returned")
    sizes = _sizes(arguments)
    if pixels.ndim != 4 or len(pixels) != len(sizes) or tuple(pixels.shape[-2:]) != tuple(map(max, *sizes, (0, 0))):
        raise ValueError(
            f"pixel_values must be (N, 3, h, w) of the N pictures that image_sizes {sizes} names, filled up to the "
            f"largest, got {tuple(pixels.shape)}: pass all that the model's own processor returned"
        )
    _check_tokens(sizes, edge, _merge(base) > 1)
    return [Frames(1, (height // edge, width // edge)) for height, width in sizes]


def _check_tokens(sizes: list[tuple[int, int]], edge: int, merges: bool) -> None:
    """Refuse pictures in which transformers' own forward finds too few tokens, each of ``edge`` x ``edge`` pixels."""
    if small := [size for size in sizes if min(size) < edge]:
        raise ValueError(
            f"image_sizes has a picture of {small[0][0]} x {small[0][1]} pixels, but a token of this model is {edge} x "
            f"{edge}: make both edges at least {edge} pixels long"
        )
    # Mistral3Model squeezes the tokens' axis away if all pictures of a call make one token.
    if merges and sum((height // edge) * (width // edge) for height, width in sizes) == 1:
        raise ValueError(
            f"the only picture of this call has {sizes[0][0]} x {sizes[0][1]} pixels, which is one token of {edge} x "
            f"{edge}, and transformers' Mistral 3 needs two: make one edge at least {2 * edge} pixels long"
        )


def _pixels(base: nn.Module, arguments: Arguments, name: str) -> list[Tensor]:
    return [picture[:, :y, :x] for picture, (y, x) in zip(arguments[name], _sizes(arguments), strict=True)]


_ENCODER = Encoder(_read, partial(all_layers, "vision_tower.transformer.layers"), _pixels, _pairs)
PIXTRAL = SeamFamily(
    {"image": modality("image", "pixel_values", _frames, _ENCODER, row_ends=True)},
    encoder=_ENCODER,
    frames=_frames,
)

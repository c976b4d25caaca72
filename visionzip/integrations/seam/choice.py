"""Choose among the tokens of frames that a model's own encoder has returned, in whatever form it returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens, compress_alike
from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens
from visionzip.methods import EncoderRead, method_of, token_counts

Size = tuple[int, int]
"""Rows and columns of a frame's tokens."""


def real_pixels(pixels: Tensor) -> Tensor:
    """Return the pixels of all frames one after the other; Idefics has them by prompt, filled up with black ones."""
    if pixels.ndim < 5:
        return pixels
    return pixels.flatten(0, 1)[shown(pixels).flatten()]


def shown(pixels: Tensor) -> Tensor:
    """Mark the images of each prompt (B, n, 3, h, w) that do not only fill up the batch: (B, n) bool."""
    return (pixels != 0).flatten(2).any(dim=-1)


def flat_tokens(features: Any) -> Tensor:
    """Join all tokens (n, D) of all frames, in whatever form the model returns them."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat(list(features))


def is_whole(config: VisionZipConfig, size: Size) -> bool:
    """Say whether all tokens of a frame are kept."""
    return token_counts(config, size[0] * size[1], False).total == size[0] * size[1]


def settings_of(config: VisionZipConfig, frames: int) -> Sequence[VisionZipConfig]:
    """List the setting of each frame, which are one unless patches are picked of some pictures.

    Raises:
        ValueError: they are picked of another number of pictures.
    """
    parts = method_of(config).parts or (config,) * frames
    if len(parts) != frames:
        raise ValueError(
            f"patches are picked of {len(parts)} encoder inputs, but the images come as {frames}: give one list, or "
            "None, for each"
        )
    return parts


class Chosen(NamedTuple):
    """Each frame's tokens in each layer, their places in the frame, and how many tokens each of them stands for."""

    layers: list[list[Tensor]]
    places: list[Tensor]
    sizes: list[Tensor]


def choose_in_frames(
    layers: list[Tensor],
    sizes: list[Size],
    scores: Tensor | None,
    keys: Tensor | None,
    pixels: Tensor | list[Tensor],
    settings: Sequence[VisionZipConfig],
) -> Chosen:
    """Choose among the tokens of each frame; frames of equal size and setting are chosen from in one batch.

    Args:
        layers: (n, D), the tokens of all frames in order, for the language model's input and then for each of its
            layers that gets some.
        sizes: the (rows, columns) of each frame's tokens.
        scores: (n,), the scores of the tokens; None if the method does not read them.
        keys: (n, Dk), the keys of the tokens; None if nothing reads them.
        pixels: the pixels of all frames one after the other, or a list of them.
        settings: the setting of each frame.
    """
    lengths = [rows * columns for rows, columns in sizes]
    per_token = len(pixels) // sum(lengths) if isinstance(pixels, Tensor) and pixels.ndim == 2 else 0
    frames: Sequence[Tensor] | Tensor = pixels
    if isinstance(pixels, Tensor) and per_token:
        frames = pixels.split([length * per_token for length in lengths])

    def batch(values: Tensor, which: list[int]) -> Tensor:
        split = values.split(lengths)
        return torch.stack([split[frame] for frame in which])

    empty = layers[0].new_empty(0)
    found = Chosen([[empty] * len(sizes) for _ in layers], [empty] * len(sizes), [empty] * len(sizes))
    kinds = list(zip(sizes, settings, strict=True))
    for size, config in dict.fromkeys(kinds):
        which = [frame for frame, own in enumerate(kinds) if own == (size, config)]
        tokens = [batch(layer, which) for layer in layers]
        kept = torch.arange(size[0] * size[1], device=tokens[0].device).expand(len(which), -1)
        group = torch.ones_like(kept, dtype=torch.float32)
        if not is_whole(config, size):
            read = EncoderRead(
                tokens[0],
                False,
                scores=None if scores is None else batch(scores, which),
                keys=None if keys is None else batch(keys, which),
                projected=tokens[0],
                pixels=torch.stack([frames[frame] for frame in which]),
                grid=size,
            )
            tokens, kept, group = _in_raster_order(tokens, choose_tokens(read, config), config)
        for at, frame in enumerate(which):
            for layer, own in zip(found.layers, tokens, strict=True):
                layer[frame] = own[at]
            found.places[frame], found.sizes[frame] = kept[at], group[at]
    return found


def _in_raster_order(
    layers: list[Tensor], chosen: CompressedTokens, config: VisionZipConfig
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sort the chosen tokens (B, T, D) of each layer, their places (B, T) and their sizes (B, T) by place."""
    kept, order = chosen.kept.sort(dim=1, stable=True)

    def ordered(values: Tensor) -> Tensor:
        return values.gather(1, order.view(*order.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))

    others = [compress_alike(layer, chosen, config.merge) for layer in layers[1:]]
    sizes = torch.ones_like(kept, dtype=torch.float32) if chosen.sizes is None else ordered(chosen.sizes)
    return [ordered(chosen.tokens), *map(ordered, others)], kept, sizes

"""Where in an image the encoder looks: the part of it that each input of an encoder shows, and each patch of that.

An image processor scales, pads, crops and cuts along the axes, so that what an encoder's square input shows is a
rectangle of the original image: the whole of it, a part where the processor crops or makes tiles, or more than the
image where it pads. Rectangles are (left, top, right, bottom) in pixels of the original image, as fractions where the
processor scales; they reach outside of the image where it pads.
"""

from __future__ import annotations

import math
from typing import Any

from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]
Rectangle = tuple[float, float, float, float]


def patch_rectangles(region: Rectangle, grid: Size) -> list[Rectangle]:
    """The rectangle of each patch, row by row.

    Args:
        region: of all of them.
        grid: (rows, columns) of patches.
    """
    left, top, right, bottom = region
    rows, columns = grid
    xs = [left + (right - left) * x / columns for x in range(columns + 1)]
    ys = [top + (bottom - top) * y / rows for y in range(rows + 1)]
    return [(xs[x], ys[y], xs[x + 1], ys[y + 1]) for y in range(rows) for x in range(columns)]


def covered_part(region: Rectangle, share: float) -> Rectangle:
    """What patches cover of a region: all, unless they do not divide the encoder's input (56 of 60 pixels)."""
    left, top, right, bottom = region
    return (left, top, left + (right - left) * share, top + (bottom - top) * share)


def padded(size: Size) -> Rectangle:
    """The square around an image (width, height) of its longer side, as LLaVA pads: the image is in its middle."""
    width, height = size
    edge = max(size)
    left, top = (edge - width) // 2, (edge - height) // 2
    return (-left, -top, edge - left, edge - top)


def cropped(size: Size, scaled: Size, crop: Size) -> Rectangle:
    """The middle of an image, as CLIP's processor cuts it.

    Args:
        size: (width, height) of the image.
        scaled: (width, height) that it is scaled to.
        crop: (width, height) that is cut out then.
    """
    left, top = ((scaled[axis] - crop[axis]) // 2 for axis in (0, 1))
    across, down = size[0] / scaled[0], size[1] / scaled[1]
    return (left * across, top * down, (left + crop[0]) * across, (top + crop[1]) * down)


def tiles(size: Size, resolution: Size, edge: int) -> list[Rectangle]:
    """The whole image, and the tiles that LLaVA-NeXT cuts it into, row by row.

    Args:
        size: (width, height) of the image.
        resolution: (width, height) that it is scaled into, and centred in.
        edge: of a tile in pixels.
    """
    width, height = size
    scale = min(resolution[0] / width, resolution[1] / height)
    if resolution[0] / width < resolution[1] / height:  # rounded up as it is scaled
        scaled = (resolution[0], min(math.ceil(height * scale), resolution[1]))
    else:
        scaled = (min(math.ceil(width * scale), resolution[0]), resolution[1])
    left, top = ((resolution[axis] - scaled[axis]) // 2 for axis in (0, 1))
    across, down = width / scaled[0], height / scaled[1]
    cells = [
        ((x - left) * across, (y - top) * down, (x + edge - left) * across, (y + edge - top) * down)
        for y in range(0, resolution[1], edge)
        for x in range(0, resolution[0], edge)
    ]
    return [(0, 0, width, height), *cells]


def processed(size: Size, processor: Any, edge: int | None = None) -> list[Rectangle]:
    """What each encoder input shows that an image processor of transformers makes of an image.

    Args:
        size: (width, height) of the image.
        processor: CLIP's, SigLIP's, or one of the LLaVA families'.
        edge: of what it makes in pixels, where it is called for another one than its own.

    Returns:
        One rectangle; of processors that make tiles the whole image's and those of the grid.
    """
    own, crop = processor.size, None
    if getattr(processor, "do_center_crop", None):
        crop = (edge or processor.crop_size["width"], edge or processor.crop_size["height"])
    shortest = edge or own.get("shortest_edge")
    if (pinpoints := getattr(processor, "image_grid_pinpoints", None)) is not None:
        height, width = select_best_resolution(size[::-1], pinpoints)
        return tiles(size, (width, height), crop[1] if crop else shortest or own["height"])
    left, top, right, bottom = (0, 0, *size)
    if hasattr(processor, "pad_to_square") and processor.do_pad:
        left, top, right, bottom = padded(size)
    if crop is None:  # squeezed into its size
        return [(left, top, right, bottom)]
    given = (right - left, bottom - top)
    scaled = (own["width"], own["height"])
    if shortest:
        scaled = tuple(int(shortest * length / min(given)) for length in given)
    inner = cropped(given, scaled, crop)
    return [(inner[0] + left, inner[1] + top, inner[2] + left, inner[3] + top)]

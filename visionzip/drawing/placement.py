"""Find the rectangle of the original image that each encoder input shows, and that each of its patches shows.

An image processor scales, pads, crops and cuts along the axes, so each square encoder input shows a rectangle of the
original image: the whole image, a part of it if the processor crops or makes tiles, or more than the image if it pads.
Rectangles are (left, top, right, bottom) in pixels of the original image. They have fractions if the processor scales,
and reach outside the image if it pads.
"""

from __future__ import annotations

import math
from typing import Any

from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]
Rectangle = tuple[float, float, float, float]


def patch_rectangles(region: Rectangle, grid: Size) -> list[Rectangle]:
    """Cut a rectangle into those of its patches, row by row.

    Args:
        region: the rectangle that all patches cover together.
        grid: (rows, columns) of patches.
    """
    left, top, right, bottom = region
    rows, columns = grid
    xs = [left + (right - left) * x / columns for x in range(columns + 1)]
    ys = [top + (bottom - top) * y / rows for y in range(rows + 1)]
    return [(xs[x], ys[y], xs[x + 1], ys[y + 1]) for y in range(rows) for x in range(columns)]


def covered_part(region: Rectangle, share: float) -> Rectangle:
    """Shrink a region to the share of its edges that patches cover, such as 56 of an input's 60 pixels."""
    left, top, right, bottom = region
    return (left, top, left + (right - left) * share, top + (bottom - top) * share)


def padded(size: Size) -> Rectangle:
    """Find the square to which LLaVA pads an image (width, height): as wide as its longer side, around its middle."""
    width, height = size
    edge = max(size)
    left, top = (edge - width) // 2, (edge - height) // 2
    return (-left, -top, edge - left, edge - top)


def cropped(size: Size, scaled: Size, crop: Size) -> Rectangle:
    """Find the middle part of an image that CLIP's processor crops.

    Args:
        size: (width, height) of the image.
        scaled: (width, height) that the processor scales it to.
        crop: (width, height) that it then crops from the middle.
    """
    left, top = ((scaled[axis] - crop[axis]) // 2 for axis in (0, 1))
    across, down = size[0] / scaled[0], size[1] / scaled[1]
    return (left * across, top * down, (left + crop[0]) * across, (top + crop[1]) * down)


def tiles(size: Size, resolution: Size, edge: int) -> list[Rectangle]:
    """List what the encoder inputs of LLaVA-NeXT show: the whole image, then its tiles row by row.

    Args:
        size: (width, height) of the image.
        resolution: (width, height) of the canvas into which the image is scaled, and in whose middle it lies.
        edge: the edge of a tile in pixels of the canvas.
    """
    width, height = size
    scale = min(resolution[0] / width, resolution[1] / height)
    if resolution[0] / width < resolution[1] / height:  # the processor rounds the shorter side up
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
    """List what the encoder inputs show that an image processor of transformers makes from an image.

    Args:
        size: (width, height) of the image.
        processor: an image processor of CLIP, SigLIP or a LLaVA family.
        edge: the edge in pixels of the inputs that it makes, if it is called with another size than its own.

    Returns:
        One rectangle; or, from a processor that makes tiles, the whole image's and those of the tiles.
    """
    own, crop = processor.size, None
    if getattr(processor, "do_center_crop", None):
        crop = (edge or processor.crop_size["width"], edge or processor.crop_size["height"])
    shortest = edge or own.get("shortest_edge")
    if (pinpoints := getattr(processor, "image_grid_pinpoints", None)) is not None:
        height, width = select_best_resolution(size[::-1], pinpoints)
        return tiles(size, (width, height), crop[1] if crop else shortest or own["height"])
    region: Rectangle = (0, 0, *size)
    if hasattr(processor, "pad_to_square") and processor.do_pad:
        region = padded(size)
    if crop is None:  # the processor squeezes all of it into its size
        return [region]
    left, top, right, bottom = region
    width, height = round(right - left), round(bottom - top)
    if shortest:
        scaled = (int(shortest * width / min(width, height)), int(shortest * height / min(width, height)))
    else:
        scaled = (own["width"], own["height"])
    inner = cropped((width, height), scaled, crop)
    return [(inner[0] + left, inner[1] + top, inner[2] + left, inner[3] + top)]

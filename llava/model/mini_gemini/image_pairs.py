"""An image in Mini-Gemini's two resolutions: as users give it, and as its towers take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ImagePair(NamedTuple):
    """An image as the original code's users give it, in both resolutions.

    Attributes:
        image: (3, e, e), or (tiles, 3, e, e) of a grid, the whole image last.
        image_aux: (3, a, a).
    """

    image: Tensor
    image_aux: Tensor


Images = Tensor | Sequence[Tensor] | Sequence[ImagePair]


def paired(images: Any, images_aux: Any) -> Any:
    """Images with their high resolution beside them, where that was given."""
    if images_aux is None or images is None:
        return images
    if len(images) != len(images_aux):
        raise ValueError(f"images_aux has {len(images_aux)} entries for {len(images)} images: give one for each")
    return [ImagePair(*pair) for pair in zip(images, images_aux, strict=True)]


def _resized(images: Tensor, edge: int) -> Tensor:
    return F.interpolate(images, size=(edge, edge), mode="bilinear", align_corners=False)


def grid_of(config: Any) -> tuple[int, bool]:
    """Tiles along an edge of an image, and whether the CLIP tower sees the whole image besides."""
    grid = getattr(config, "image_grid", None) or 1
    return grid, grid > 1 and bool(getattr(config, "image_global", False))


def pair_of(given: Any, index: int, config: Any, edge: int, device: torch.device) -> ImagePair:
    """An image for both towers: tiles (T, 3, e, e), the whole image first, and (3, a, a).

    Args:
        given: (3, a, a), or both as users give them.
        index: among the images, for messages.
        config: the model's.
        edge: e, of the CLIP tower's images in pixels.
        device: of the towers.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape.
    """
    edge_aux = config.image_size_aux
    grid, has_whole = grid_of(config)
    low, high = given if isinstance(given, ImagePair) else (None, given)
    tiles = grid**2 + has_whole
    shapes = {"image_aux": ((3, edge_aux, edge_aux), high)}
    if low is not None:
        low = low[None] if isinstance(low, Tensor) and low.ndim == 3 else low
        shapes["image"] = ((tiles, 3, edge, edge), low)
    for name, (shape, value) in shapes.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"images[{index}] is a {type(value).__name__}, not a tensor: prepare images with "
                "llava.mm_utils.process_images"
            )
        if tuple(value.shape) != shape:
            which = f"images[{index}]" if low is None or name == "image" else f"images_aux[{index}]"
            raise ValueError(
                f"{which} has shape {tuple(value.shape)}, but it must be {shape}: Mini-Gemini takes images of "
                f"image_size_aux={edge_aux} pixels, as llava.mm_utils.process_images makes them with the model's "
                f"config; images of {edge} pixels need images_aux too"
            )
    high = high.to(device)
    if low is not None:
        low = low.to(device)
        return ImagePair(torch.cat([low[-1:], low[:-1]]) if has_whole else low, high)
    # In float32 and from the prepared pixels, as the released scripts do.
    large = _resized(high[None].float(), grid * edge)
    cells = large[0].unflatten(2, (grid, edge)).unflatten(1, (grid, edge)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    low = torch.cat([_resized(large, edge), cells]) if has_whole else cells
    return ImagePair(low.to(high.dtype), high)

"""An image or a video as a model sees it, in plain data and in its own pixels: what the page shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llava.mm_utils import Size, parse_pinpoints, process_images, processor_resolution, select_best_resolution
from llava.model import MGMLlamaForCausalLM
from llava.video import Visual
from visionzip.drawing import placement
from visionzip.drawing.pair_attention import packed_pairs, pair_attention
from visionzip.token_map import TokenMap, inspect_tokens, token_data


def encoder_inputs(model: Any, image: Image.Image, image_processor: Any) -> Tensor:
    """What a model's vision tower is given of an image.

    Args:
        model: from ``load_pretrained_model``.
        image: as :func:`llava.images.load_image` reads it.
        image_processor: the model's.

    Returns:
        (T, 3, h, w): one, or the whole image and then its tiles row by row. Of Mini-Gemini's the whole image alone.

    Raises:
        ValueError: the image cannot be read, or the config's image settings are not supported.
    """
    prepared = process_images([image], image_processor, model.config)[0]
    if isinstance(model, MGMLlamaForCausalLM):
        return model.whole_images(prepared[None])
    return prepared if prepared.ndim == 4 else prepared[None]


def encoder_regions(size: Size, image_processor: Any, config: Any) -> list[placement.Rectangle]:
    """What of an image each of its encoder inputs shows.

    Args:
        size: (width, height) of the image.
        image_processor: the model's.
        config: the model's, by which :func:`llava.mm_utils.process_images` prepares images.

    Returns:
        (left, top, right, bottom) of each, as :mod:`visionzip.drawing.placement` has them, in the order of
        :func:`encoder_inputs`.
    """
    aspect_ratio, edge = getattr(config, "image_aspect_ratio", None), processor_resolution(image_processor)
    if aspect_ratio == "anyres":
        resolution = select_best_resolution(size, parse_pinpoints(config.image_grid_pinpoints))
        return placement.tiles(size, resolution, edge)
    if aspect_ratio == "pad":
        return [placement.padded(size)]
    return placement.processed(size, image_processor, getattr(config, "image_size_aux", None))


def video_region(size: Size, model: Any, image_processor: Any) -> placement.Rectangle:
    """What of a frame its encoder input shows, as the model's ``video_pixels`` makes it.

    Args:
        size: (width, height) of the frame.
        model: one that takes videos.
        image_processor: the model's.

    Returns:
        (left, top, right, bottom), as :mod:`visionzip.drawing.placement` has them.
    """
    kind = getattr(model, "kind", None)
    if kind is not None and kind.processor:  # squeezed into a square
        return (0.0, 0.0, float(size[0]), float(size[1]))
    if kind is not None and kind.tiles:
        return placement.processed(size, image_processor)[0]
    edge = processor_resolution(image_processor)
    width, height = (side * edge // min(size) for side in size)
    return placement.cropped(size, (width, height), (edge, edge))


class _Seen(NamedTuple):
    """What is shown: a map and a region each; how many encoder inputs there are in all; and those for pairs, if any."""

    maps: list[TokenMap]
    regions: Sequence[placement.Rectangle]
    total: int
    inputs: Tensor | None


def _seen(model: Any, visual: Visual, image_processor: Any) -> _Seen:
    """An image with its tiles; of a video the frames, of each the whole one."""
    frames = [visual] if isinstance(visual, Image.Image) else list(visual)
    size = frames[0].size
    if model.takes_videos and not isinstance(visual, Image.Image):
        pixels = model.video_pixels(frames, image_processor)
        maps = inspect_tokens(model, pixels if pixels.ndim == 5 else pixels[None], videos=True)
        return _Seen(maps, [video_region(size, model, image_processor)] * len(maps), len(maps), None)
    prepared = [encoder_inputs(model, frame, image_processor) for frame in frames]
    regions = encoder_regions(size, image_processor, model.config)
    inputs = prepared[0]
    if not isinstance(visual, Image.Image):
        inputs, regions = torch.cat([own[:1] for own in prepared]), regions[:1] * len(frames)
    maps = inspect_tokens(model, inputs)
    return _Seen(maps, regions[: len(maps)], sum(map(len, prepared)), inputs)


def picture_data(model: Any, visual: Visual, image_processor: Any, pairs: bool = False) -> dict[str, Any]:
    """Say what a model sees of an image or a video, keeps and merges, in numbers and lists that ``json`` takes.

    The vision tower is run to its end, and once more if it is zipped; the language model is not.

    Args:
        model: from ``load_pretrained_model``, zipped or not.
        visual: an image, RGB and upright, as :func:`llava.images.load_image` reads it; or the frames of a video.
        image_processor: the model's.
        pairs: say too what each patch attends to, N x N numbers.

    Returns:
        - ``size`` [width, height] of the image or a frame, in whose pixels all rectangles are;
        - ``frames``: how many the video has; None for an image;
        - ``method`` by name and ``setting`` as messages have it; None if the model is not zipped;
        - ``patches``, ``cls_token``: what one encoder input has (of a frame that the model pools, pooled ones);
          ``keeps_cls``: whether CLS is a visual token;
        - ``tokens`` [before, after]: in the encoder, of all its inputs; and visual tokens that are left of them (those
          before, if the model is not zipped), without newlines;
        - ``layers``: how many have attention; ``layer``: the index, from 0, of the one that decides;
        - ``pairable``: whether ``pairs`` can be had; ``pickable``: whether patches can be picked;
        - ``tiles``: of each encoder input what :func:`visionzip.token_map.token_data` says: one, or the whole image and
          then its tiles row by row; of a video its frames. With ``pairs`` each has these too, as
          :func:`visionzip.drawing.pair_attention.packed_pairs` packs them.

    Raises:
        ValueError: the image cannot be read, or does not fit the model's settings.
        OSError: the model has no image processor.
    """
    is_image = isinstance(visual, Image.Image)
    maps, regions, total, inputs = _seen(model, visual, image_processor)
    first, zipped = maps[0], maps[0].roles is not None
    before = (first.num_patches + first.cls_token) * total
    after = first.num_kept * total if zipped else before
    tower = model.get_vision_tower()
    covered = tower.num_patches_per_side * tower.config.patch_size / tower.config.image_size
    shown = [placement.covered_part(region, covered) for region in regions]
    tiles = [token_data(tokens, region) for tokens, region in zip(maps, shown, strict=True)]
    if pairs and inputs is not None:
        for tile, attention in zip(tiles, pair_attention(model, inputs), strict=True):
            tile["pairs"] = packed_pairs(attention)
    return {
        "size": list(visual.size if is_image else visual[0].size),
        "frames": None if is_image else len(visual),
        "method": first.method.name if zipped else None,
        "setting": str(first.setting) if zipped else None,
        "patches": first.num_patches,
        "cls_token": first.cls_token,
        "keeps_cls": first.keeps_cls,
        "tokens": [before, after],
        "layers": len(first.attention),
        "layer": first.layer,
        "pairable": inputs is not None,
        "pickable": is_image,
        "tiles": tiles,
    }

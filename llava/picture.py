"""One image as a model sees it, in plain data and in the image's own pixels: what the page shows of it."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from llava.mm_utils import Size, parse_pinpoints, process_images, processor_resolution, select_best_resolution
from llava.model import MGMLlamaForCausalLM
from visionzip.drawing import placement
from visionzip.drawing.pair_attention import packed_pairs, pair_attention
from visionzip.token_map import inspect_tokens, token_data


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


def picture_data(model: Any, image: Image.Image, image_processor: Any, pairs: bool = False) -> dict[str, Any]:
    """Say what a model sees of an image, keeps of it and merges, in numbers and lists that ``json`` takes.

    The vision tower is run to its end, and once more if it is zipped; the language model is not.

    Args:
        model: from ``load_pretrained_model``, zipped or not.
        image: RGB and upright, as :func:`llava.images.load_image` reads it.
        image_processor: the model's.
        pairs: say too what each patch attends to, N x N numbers.

    Returns:
        - ``size`` [width, height] of the image, in whose pixels all rectangles are;
        - ``method`` by name and ``setting`` as messages have it; None if the model is not zipped;
        - ``patches``, ``cls_token``: what one encoder input has; ``keeps_cls``: whether CLS is a visual token;
        - ``tokens`` [before, after]: in the encoder, of all its inputs; and visual tokens that are left of them (those
          before, if the model is not zipped), without newlines;
        - ``layers``: how many have attention; ``layer``: the index, from 0, of the one that decides;
        - ``pairable``: whether ``pairs`` can be had of this model; ``pickable``: whether patches can be picked;
        - ``tiles``: of each encoder input what :func:`visionzip.token_map.token_data` says: one, or the whole image and
          then its tiles row by row. With ``pairs`` each has these too, as
          :func:`visionzip.drawing.pair_attention.packed_pairs` packs them.

    Raises:
        ValueError: the image cannot be read, or does not fit the model's settings.
        OSError: the model has no image processor.
    """
    inputs = encoder_inputs(model, image, image_processor)
    maps = inspect_tokens(model, inputs)
    first, zipped = maps[0], maps[0].roles is not None
    before = (first.num_patches + first.cls_token) * len(maps)
    after = first.num_kept * len(maps) if zipped else before
    tower = model.get_vision_tower()
    covered = tower.num_patches_per_side * tower.config.patch_size / tower.config.image_size
    regions = encoder_regions(image.size, image_processor, model.config)[: len(maps)]
    shown = [placement.covered_part(region, covered) for region in regions]
    tiles = [token_data(tokens, region) for tokens, region in zip(maps, shown, strict=True)]
    if pairs:
        for tile, attention in zip(tiles, pair_attention(model, inputs), strict=True):
            tile["pairs"] = packed_pairs(attention)
    return {
        "size": list(image.size),
        "method": first.method.name if zipped else None,
        "setting": str(first.setting) if zipped else None,
        "patches": first.num_patches,
        "cls_token": first.cls_token,
        "keeps_cls": first.keeps_cls,
        "tokens": [before, after],
        "layers": len(first.attention),
        "layer": first.layer,
        "pairable": True,
        "pickable": True,
        "tiles": tiles,
    }

"""Images and prompts into tensors, with LLaVA's function names.

Sizes of images are (width, height) throughout, as PIL and LLaVA's configs have them.
"""

from __future__ import annotations

import ast
import base64
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.images import load_image

Size = tuple[int, int]


def load_image_from_base64(image: str) -> Image.Image:
    """Open an image that is given as base64 text, as RGB.

    Raises:
        ValueError: it is no base64, or what it holds is no image that can be read.
    """
    try:
        content = base64.b64decode(image)
    except ValueError as error:
        raise ValueError(f"{image[:60]!r}… is no base64 text ({error}): a data URL is for load_image") from error
    return load_image(content)


def select_best_resolution(original_size: Size, possible_resolutions: list[Size]) -> Size:
    """The resolution that keeps most of the image's pixels, and among those wastes least; ties go to the first.

    Args:
        original_size: (width, height) of the image, in pixels.
        possible_resolutions: (width, height) each.

    Source: LLaVA-NeXT. Whole pixels (rounded down) decide close calls.
    """
    width, height = original_size

    def effective_and_wasted(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return tuple(max(possible_resolutions, key=effective_and_wasted))


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale an image to fit into a resolution and centre it on black.

    Args:
        image: RGB image of any size.
        target_resolution: (width, height) in pixels.

    Returns:
        An RGB image of that size. Source: LLaVA-NeXT, with its rounding up.
    """
    scale_width, scale_height = target_resolution[0] / image.width, target_resolution[1] / image.height
    if scale_width < scale_height:
        size = target_resolution[0], min(math.ceil(image.height * scale_width), target_resolution[1])
    else:
        size = min(math.ceil(image.width * scale_height), target_resolution[0]), target_resolution[1]
    canvas = Image.new("RGB", tuple(target_resolution), (0, 0, 0))
    canvas.paste(image.resize(size), ((target_resolution[0] - size[0]) // 2, (target_resolution[1] - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into square tiles, row by row.

    Args:
        image: of a size that ``patch_size`` divides, as :func:`resize_and_pad_image` makes it.
        patch_size: edge of a tile in pixels.
    """
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def parse_pinpoints(grid_pinpoints: str | list[Size]) -> list[Size]:
    """The config's ``image_grid_pinpoints``, a list or its text, as (width, height) pairs.

    Raises:
        ValueError: it lists no resolutions.
    """
    try:
        points = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        sizes = [(int(width), int(height)) for width, height in points]
    except (SyntaxError, TypeError, ValueError):
        sizes = []
    if not sizes:
        raise ValueError(
            f"image_grid_pinpoints={grid_pinpoints!r} lists no resolutions: anyres needs (width, height) pairs such as "
            "[[336, 672], [672, 336], [672, 672]] in the model's config"
        )
    return sizes


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: str | list[Size], patch_size: int) -> Size:
    """(columns, rows) of tiles that an image is cut into.

    Args:
        image_size: (width, height) of the image, in pixels.
        grid_pinpoints: allowed resolutions (width, height), as a list or as its text.
        patch_size: edge of a tile in pixels.

    Raises:
        ValueError: ``grid_pinpoints`` lists no resolutions.
    """
    width, height = select_best_resolution(image_size, parse_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def processor_resolution(processor: Any) -> int:
    """Edge in pixels of the square that an image processor makes (CLIP: its crop, SigLIP: its size)."""
    size = getattr(processor, "crop_size", None) or processor.size
    return size["height"]


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: str | list[Size]) -> Tensor:
    """An image as tiles: itself, squeezed to one tile, then the cells of its best grid, row by row.

    Args:
        image: RGB image of any size.
        processor: the vision tower's image processor.
        grid_pinpoints: allowed resolutions (width, height).

    Returns:
        (tiles, 3, h, w) float32.

    Raises:
        ValueError: ``grid_pinpoints`` lists no resolutions.
    """
    edge = processor_resolution(processor)
    resolution = select_best_resolution(image.size, parse_pinpoints(grid_pinpoints))
    tiles = [image.resize((edge, edge)), *divide_to_patches(resize_and_pad_image(image, resolution), edge)]
    return processor.preprocess(tiles, return_tensors="pt")["pixel_values"]


def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """Centre an image on a square of its longer side.

    Args:
        pil_img: image of any size.
        background_color: one value, 0 to 255, for each of its channels.

    Returns:
        The square image; a square one comes back as it is.
    """
    if pil_img.width == pil_img.height:
        return pil_img
    edge = max(pil_img.size)
    square = Image.new(pil_img.mode, (edge, edge), background_color)
    square.paste(pil_img, ((edge - pil_img.width) // 2, (edge - pil_img.height) // 2))
    return square


def process_images(images: list[Image.Image], image_processor: Any, model_cfg: Any) -> Tensor | list[Tensor]:
    """Images as the model was trained to see them: padded to a square, cut into tiles, or as the processor has it.

    Args:
        images: PIL images of any size, read as :func:`llava.images.load_image` does: upright, on white, 16 bits as 8.
        image_processor: the vision tower's, third value of ``load_pretrained_model``.
        model_cfg: the model's config. ``image_aspect_ratio`` is ``"pad"`` (to a square, with the mean colour),
            ``"anyres"`` (``image_grid_pinpoints`` lists the resolutions) or anything else: as the processor has it.
            ``image_size_aux`` (Mini-Gemini) replaces the processor's resolution.

    Returns:
        (N, 3, h, w), or (N, tiles, 3, h, w) for anyres; a list of such tensors if the images have different numbers of
        tiles.

    Raises:
        TypeError: an element is not a PIL image.
        ValueError: there are no images, or one cannot be read; ``image_aspect_ratio`` is a variant of anyres that is
            not supported; or an image for anyres lies on its side, so that its ``size``, which ``generate`` needs as
            ``image_sizes``, would not be that of its tiles.
    """
    if isinstance(images, Image.Image):
        images = [images]
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"images[{index}] is a {type(image).__name__}, not a PIL image: open files with "
                "llava.mm_utils.load_image"
            )
    if not images:
        raise ValueError("images is empty: give at least one, or leave images out for a text-only prompt")
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    upright = [load_image(image, name=f"images[{index}]") for index, image in enumerate(images)]
    if aspect_ratio == "anyres":
        for index, (image, turned) in enumerate(zip(images, upright, strict=True)):
            if turned.size != image.size:
                raise ValueError(
                    f"images[{index}] lies on its side, as its EXIF orientation says: turn it with "
                    f"llava.mm_utils.load_image(image) first, and give image_sizes of the result, {turned.size}"
                )
        pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
        tensors = [process_anyres_image(image, image_processor, pinpoints) for image in upright]
    elif str(aspect_ratio).startswith("anyres"):
        raise ValueError(
            f"image_aspect_ratio={aspect_ratio!r} is not supported (it is LLaVA-OneVision's): supported are 'pad' and "
            "'anyres'"
        )
    else:
        if aspect_ratio == "pad":
            mean_color = tuple(int(channel * 255) for channel in image_processor.image_mean)
            upright = [expand2square(image, mean_color) for image in upright]
        size = {}
        if edge := getattr(model_cfg, "image_size_aux", None):
            size = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
        tensors = list(image_processor.preprocess(upright, return_tensors="pt", **size)["pixel_values"])
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(tensors)
    return tensors


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """Token ids of a prompt, each ``<image>`` in it replaced by the sentinel.

    The texts between are tokenized apart; the beginning-of-sequence token stays once, at the front.

    Args:
        prompt: text of the whole conversation, from a template's ``get_prompt``.
        tokenizer: returns ``input_ids`` for a text and has a ``bos_token_id``.
        image_token_index: the sentinel.
        return_tensors: ``"pt"`` for a tensor, None for a list.

    Returns:
        L ids, or an int64 tensor of shape (L,).

    Raises:
        ValueError: another ``return_tensors``.
    """
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
    has_bos = bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids.append(image_token_index)
        ids.extend(chunk[int(has_bos) :])
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors={return_tensors!r} is not supported: use 'pt' or None")


def get_model_name_from_path(model_path: str) -> str:
    """Name of a model from its path or hub name; a training checkpoint's includes the run's folder."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops when every answer of the batch has one of some keywords; LLaVA's, for scripts that use it.

    (``generate(stop_strings=[…], tokenizer=tokenizer)`` does the same.)

    Args:
        keywords: texts to stop at.
        tokenizer: decodes the answers.
        input_ids: (B, L) prompts; not read, since ``generate`` of these models returns the answers only.
    """

    def __init__(self, keywords: list[str], tokenizer: Any, input_ids: Tensor) -> None:
        self.keywords = keywords
        self.tokenizer = tokenizer

    def __call__(self, output_ids: Tensor, scores: Tensor, **kwargs: Any) -> bool:
        """Whether all answers (B, new) have a keyword."""
        answers = self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)
        return all(any(keyword in answer for keyword in self.keywords) for answer in answers)

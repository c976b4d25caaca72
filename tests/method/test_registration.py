"""Pictures register: a patch's rectangle in the original image is where its pixels come from, and where it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import hf_video_models
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from transformers import LlavaImageProcessorPil

from checkpoints import CLIP, NEXT, SIGLIP
from llava.model.builder import load_pretrained_model
from llava.picture import _seen, encoder_inputs, picture_data
from visionzip import visionzip
from visionzip.drawing import placement
from visionzip.drawing.placement import Rectangle
from visionzip.token_map import TokenMap, inspect_tokens
from visionzip.visualize import attention_map, token_overlay

COLOR = (255, 0, 255)
SIZES = [(112, 112), (150, 67), (61, 190), (56, 31)]  # the last one is padded without being scaled
sizes = pytest.mark.parametrize("size", SIZES, ids=["square", "wide", "tall", "unscaled"])


def with_cell(size: tuple[int, int], cell: Rectangle) -> Image.Image:
    """A black image with one coloured cell, of whole pixels."""
    image = Image.new("RGB", size)
    image.paste(COLOR, tuple(int(edge) for edge in cell))
    return image


def colored(pixels: torch.Tensor) -> torch.Tensor:
    """Where pixels (h, w, 3) in 0..1 have the cell's colour, which neither black nor what processors pad with is."""
    return (pixels[..., 0] > 0.5) & (pixels[..., 1] < 0.25) & (pixels[..., 2] > 0.5)


def check_cell(tokens: TokenMap, region: Rectangle, cell: Rectangle) -> None:
    """The pixels that the encoder saw are coloured where the cell is in the image, to 0.6 pixels."""
    height, width = tokens.image.shape[:2]
    across, down = (region[2] - region[0]) / width, (region[3] - region[1]) / height
    x = region[0] + (torch.arange(width) + 0.5) * across
    y = region[1] + (torch.arange(height) + 0.5) * down

    def within(slack: float) -> torch.Tensor:
        """Pixels whose middles are in the cell, made smaller by so many pixels."""
        dx, dy = slack * across, slack * down
        rows, columns = (y > cell[1] + dy) & (y < cell[3] - dy), (x > cell[0] + dx) & (x < cell[2] - dx)
        return rows[:, None] & columns

    found = colored(tokens.image)
    assert within(0.6).any()
    assert found[within(0.6)].all() and not found[~within(-0.6)].any()


def part_in_image(rectangle: Rectangle, size: tuple[int, int]) -> Rectangle | None:
    """The whole pixels of a patch that are in the image, not in the padding; None if they are less than half of it."""
    left, top, right, bottom = rectangle
    part = (max(round(left), 0), max(round(top), 0), min(round(right), size[0]), min(round(bottom), size[1]))
    enough = part[2] - part[0] > (right - left) / 2 and part[3] - part[1] > (bottom - top) / 2
    return part if enough else None


IN_TREE = {
    "pad": {"vision": CLIP},
    "crop": {"vision": CLIP, "image_aspect_ratio": "square"},
    "siglip-pad": {"vision": SIGLIP},
    "squeeze": {"vision": SIGLIP, "image_aspect_ratio": "square"},
    "uneven": {"vision": {**CLIP, "image_size": 60}, "image_aspect_ratio": "square"},  # 4 pixels are left over
    "anyres": NEXT,
}


def check_tiles(tiles: list[list[Rectangle]], size: tuple[int, int], look: Callable[[Image.Image], list[Any]]) -> None:
    """Of each tile one patch is coloured in the image, and found in the pixels that this tile's encoder saw."""
    checked = 0
    for index, rects in enumerate(tiles):
        cells = [part for rectangle in rects if (part := part_in_image(rectangle, size))]
        if len(cells) > 1:  # else it shows padding
            cell = cells[1]  # neither in the middle nor on a diagonal, where a mirrored grid would not be noticed
            region = (*rects[0][:2], *rects[-1][2:])
            check_cell(look(with_cell(size, cell))[index], region, cell)
            checked += 1
    assert checked >= (len(tiles) + 1) // 2


@sizes
@pytest.mark.parametrize("case", IN_TREE)
def test_in_tree_models(load: Any, case: str, size: tuple[int, int]):
    _, model, processor, _ = load(**IN_TREE[case])
    data = picture_data(model, Image.new("RGB", size), processor)
    assert data["size"] == list(size)
    assert (len(data["tiles"]) > 1) == (case == "anyres")
    rects = [tile["rects"] for tile in data["tiles"]]
    check_tiles(rects, size, lambda image: inspect_tokens(model, encoder_inputs(model, image, processor)))


@sizes
def test_mini_gemini(load_mgm: Any, size: tuple[int, int]):
    """What its CLIP tower sees is made from the high resolution: of the same part of the image."""
    model = load_mgm()
    processor = model.get_vision_tower().image_processor
    rects = [tile["rects"] for tile in picture_data(model, Image.new("RGB", size), processor)["tiles"]]
    check_tiles(rects, size, lambda image: inspect_tokens(model, encoder_inputs(model, image, processor)))


@sizes
@pytest.mark.parametrize("case", ["llava", "video-llava", *hf_video_models.FAMILIES])
def test_frames_of_videos(case: str, size: tuple[int, int], load: Any, make_video_checkpoint: Any, tmp_path: Path):
    """A frame's patch is where its pixels are, whether the model pads, crops or squeezes, and whether it pools."""
    if case == "llava":
        _, model, processor, _ = load()
    else:
        folder = make_video_checkpoint() if case == "video-llava" else hf_video_models.save(case, tmp_path / case)
        _, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    black = Image.new("RGB", size)
    rects = picture_data(model, [black, black], processor)["tiles"][1]["rects"]
    frame = next(part for rectangle in rects[1:] if (part := part_in_image(rectangle, size)))
    maps = _seen(model, [black, with_cell(size, frame)], processor).maps
    assert not colored(maps[0].image).any()
    check_cell(maps[1], (*rects[0][:2], *rects[-1][2:]), frame)


EDGE = hf_models.EDGE
STOCK: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "crop": (hf_models.llava, hf_models.llava_processor),
    "pad": (
        hf_models.llava,
        lambda: LlavaImageProcessorPil(
            size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}, do_pad=True
        ),
    ),
    "anyres": (hf_models.llava_next, hf_models.next_processor),
    "onevision": (
        lambda: hf_video_models.build("onevision"),
        lambda: hf_video_models.processor_for("onevision"),
    ),
}


@sizes
@pytest.mark.parametrize("case", STOCK)
def test_models_of_transformers_with_their_own_processors(case: str, size: tuple[int, int]):
    model, processor = (make() for make in STOCK[case])
    image_processor = getattr(processor, "image_processor", processor)
    grid = (EDGE // 14,) * 2
    regions = placement.processed(size, image_processor)

    def look(image: Image.Image) -> list[TokenMap]:
        pixels = image_processor([image], return_tensors="pt")["pixel_values"]
        return inspect_tokens(model, pixels.flatten(0, -4), processor)

    assert len(look(Image.new("RGB", size))) == len(regions)
    check_tiles([placement.patch_rectangles(region, grid) for region in regions], size, look)


def rendered(figure: Figure) -> np.ndarray:
    """Its pixels (h, w, 3) in 0..1, as savefig writes them."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


@pytest.mark.parametrize("draw", [attention_map, token_overlay], ids=["attention", "overlay"])
def test_the_figure_draws_a_patch_in_its_place(load: Any, draw: Callable[..., Figure]):
    """Of 4 x 4 patches the one in row 2, column 1 is coloured: so it is in the file, to a pixel."""
    _, model, processor, _ = load(image_aspect_ratio="square")
    with_patch = with_cell((56, 56), (14, 28, 28, 42))
    visionzip(model, keep=15, method="uniform")  # one patch is dropped: the last but one of the first half
    (tokens,) = inspect_tokens(model, encoder_inputs(model, with_patch, processor))
    assert tokens.roles.dominant[2 * 4 + 1]
    figure = draw([tokens])
    pixels = rendered(figure)
    box = figure.axes[0].get_window_extent()
    found = colored(torch.from_numpy(pixels))
    rows, columns = (found.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    height = len(pixels)  # counted from the top, the figure's own from the bottom
    expected = (
        height - box.y1 + box.height * 2 / 4,
        height - box.y1 + box.height * 3 / 4,
        box.x0 + box.width * 1 / 4,
        box.x0 + box.width * 2 / 4,
    )
    drawn = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    assert max(abs(float(a) - b) for a, b in zip(drawn, expected, strict=True)) <= 1

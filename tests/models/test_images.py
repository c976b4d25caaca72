"""The one loader of images: what it reads, as people see it and as LLaVA stores it, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from checkpoints import encoded, picture
from eval.reading.sources import picture as benchmark_picture
from eval.reading.sources import picture_of
from llava.images import load_image
from llava.mm_utils import process_images
from llava.video import process_visuals

GREY = np.arange(48 * 32, dtype=np.uint32).reshape(32, 48) % 256


def turned(orientation: int) -> Image.Exif:
    """EXIF that says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5 %d %d %d\n" % (*values.shape[::-1], white) + values.astype(">u2").tobytes()


WIDE = Image.fromarray((GREY * 257).astype(np.uint16))


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize(
    "content",
    [encoded(WIDE), encoded(WIDE, "TIFF"), pgm(GREY * 257, 65535), encoded(WIDE, "JPEG2000")],
    ids=["png", "tiff", "pgm", "jp2"],
)
def test_sixteen_bits_become_eight(content: bytes, as_stored: bool):
    """Where Pillow cuts all above 255 to white."""
    assert np.array_equal(array(load_image(content, as_stored=as_stored)), np.repeat(GREY[..., None], 3, axis=2))


def test_pgm_of_twelve_bits():
    values = array(load_image(pgm(np.array([[0, 2048, 4095]]), 4095)))
    assert values[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_pixels_without_a_known_white_are_refused(dtype: type, mode: str, as_stored: bool):
    image = Image.fromarray((GREY / 255).astype(dtype))
    for source in (image, encoded(image, "TIFF")):
        with pytest.raises(ValueError, match=rf"mode {mode} \(32-bit .*scale them to 0…255"):
            load_image(source, as_stored=as_stored)


def test_process_images_reads_pictures_of_any_mode_so():
    """As they are handed over by those who open files themselves."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = process_images([Image.fromarray(GREY.astype(np.uint8))], processor, SimpleNamespace())
    for mode in (WIDE, Image.open(io.BytesIO(encoded(WIDE)))):
        assert torch.equal(process_images([mode], processor, SimpleNamespace()), expected)
    with pytest.raises(ValueError, match=r"images\[1\] has pixels of mode F"):
        process_images([WIDE, Image.new("F", (8, 8))], processor, SimpleNamespace())
    with pytest.raises(ValueError, match=r"images\[0\] is not a readable image \(image file is truncated"):
        process_images([Image.open(io.BytesIO(encoded(picture(0))[:3000]))], processor, SimpleNamespace())

    sideways = Image.open(io.BytesIO(encoded(picture(0), "PNG", exif=turned(6))))
    upright = picture(0).transpose(Image.Transpose.ROTATE_270)
    expected = process_images([upright], processor, SimpleNamespace())
    for image in (sideways, sideways.convert("RGB"), load_image(sideways)):  # once, not twice
        assert torch.equal(process_images([image], processor, SimpleNamespace()), expected)
    stored = load_image(sideways, as_stored=True)
    plain = process_images([picture(0)], processor, SimpleNamespace())
    assert torch.equal(process_images([stored], processor, SimpleNamespace()), plain)

    tiles = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[32, 64], [64, 32]])
    with pytest.raises(ValueError, match=r"images\[0\] lies on its side.*load_image.*\(60, 90\)"):
        process_images([sideways], processor, tiles)
    model = SimpleNamespace(takes_videos=False, config=tiles)
    tensors, sizes = process_visuals([sideways], processor, model)
    assert sizes == [(60, 90)] and torch.equal(tensors[0], process_images([upright], processor, tiles)[0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int):
    """Shown upright; as stored, the pixels of the file."""
    lossless = {"WEBP": {"lossless": True}}.get(kind, {})
    file = encoded(picture(0), kind, exif=turned(orientation), **lossless)
    stored = load_image(encoded(picture(0), kind, **lossless))
    pixels = np.asarray(stored)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    assert np.array_equal(array(load_image(file)), pixels)
    assert load_image(file, as_stored=True).tobytes() == stored.tobytes()


def test_damaged_notes_do_not_keep_a_picture_from_being_read():
    file = encoded(picture(0), "JPEG", exif=turned(6))
    broken = file.replace(b"MM\x00*", b"M!\x01*").replace(b"II*\x00", b"I!*\x01")
    assert broken != file and load_image(broken).size == (90, 60)


def transparent_pictures() -> dict[str, bytes]:
    """Black with its left half transparent, in all the ways that files have."""
    alpha = Image.new("L", (4, 2), 255)
    alpha.paste(0, (0, 0, 2, 2))
    black = Image.new("RGB", (4, 2))
    colours = black.copy()
    colours.paste((9, 9, 9), (0, 0, 2, 2))
    rgba, grey = black.copy(), black.convert("L")
    rgba.putalpha(alpha)
    grey.putalpha(alpha)
    palette = Image.fromarray(np.array([[1, 1, 0, 0]] * 2, dtype=np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    wide = Image.fromarray(np.array([[7, 7, 0, 0]] * 2, dtype=np.uint16))
    return {
        "rgba": encoded(rgba),
        "grey": encoded(grey),
        "palette": encoded(palette, transparency=1),
        "gif": encoded(palette, "GIF", transparency=1),
        "colour": encoded(colours, transparency=(9, 9, 9)),
        "16 bits": encoded(wide, transparency=7),
        "webp": encoded(rgba, "WEBP", lossless=True, exact=True),
    }


@pytest.mark.parametrize("name", transparent_pictures())
def test_transparency(name: str):
    """Is white; as stored, the colour that nobody sees, as in LLaVA."""
    content = transparent_pictures()[name]
    assert array(load_image(content))[0, :, 0].tolist() == [255, 255, 0, 0]
    assert array(load_image(Image.open(io.BytesIO(content))))[0, :, 0].tolist() == [255, 255, 0, 0]
    assert array(load_image(content, as_stored=True)).max() <= 9
    assert array(load_image(load_image(content, as_stored=True))).max() <= 9


def test_what_is_opaque_is_as_it_was():
    assert load_image(encoded(picture(0))).tobytes() == picture(0).tobytes()
    assert load_image(encoded(picture(0).convert("RGBA"))).tobytes() == picture(0).tobytes()
    image = picture(0)
    assert load_image(image) is image
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)


def test_benchmarks_and_training_read_what_is_stored(dataset, tmp_path: Path):
    """LLaVA's rule, for figures that can be compared."""
    content = encoded(picture(3), exif=turned(6))
    (tmp_path / "3.png").write_bytes(content)
    for visual in (
        benchmark_picture(tmp_path / "3.png"),
        picture_of(content, "row 3"),
        picture_of({"bytes": content}, ""),
    ):
        assert visual.open()[0].tobytes() == picture(3).tobytes()
    conversation = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A ring."}]
    sample = dataset([{"image": "3.png", "conversations": conversation}], image_folder=tmp_path)[0]
    assert sample["image_size"] == (90, 60)
    assert torch.equal(sample["image"], dataset()[3]["image"])

"""The one loader of images: what it reads, as people see it and as LLaVA stores it, and what it refuses."""

from __future__ import annotations

import base64
import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from checkpoints import picture
from eval.sources import picture as benchmark_picture
from eval.sources import picture_of
from llava.eval import run_llava
from llava.images import load_image
from llava.mm_utils import load_image_from_base64, process_images
from llava.serve.cli import main as llava_cli
from llava.video import process_visuals

GREY = np.arange(48 * 32, dtype=np.uint32).reshape(32, 48) % 256
TURNS = {1: 0, 3: 180, 6: 270, 8: 90}  # counter-clockwise


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An image file's content."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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


# Sources


class _Images(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/short.png":
            self.send_response(200)
            self.send_header("Content-Length", "999")
            self.end_headers()
            self.wfile.write(b"\x89PNG")
        elif self.path == "/picture.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(picture(0)))
        else:
            self.send_error(404)

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def server():
    with HTTPServer(("127.0.0.1", 0), _Images) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_sources(server: str, tmp_path: Path):
    content = encoded(picture(0))
    path = tmp_path / "cube.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    with path.open("rb") as file:
        file.read()  # its place does not matter
        sources = (
            path,
            str(path),
            content,
            bytearray(content),
            io.BytesIO(content),
            file,
            f"data:image/png;base64,{text}",
            f"{server}/picture.png",
            server.replace("http", "HTTP") + "/picture.png",
            Image.open(path),
        )
        for source in sources:
            assert load_image(source).tobytes() == picture(0).tobytes()
        assert run_llava.load_image(file).size == (90, 60)
    assert load_image_from_base64(text).tobytes() == picture(0).tobytes()


def test_wrong_sources(server: str, tmp_path: Path):
    content = encoded(picture(0))
    text = base64.b64encode(content).decode()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/cat.png"
    for source, kind, message in (
        ("none.png", FileNotFoundError, "no image file at none.png"),
        (tmp_path, FileNotFoundError, f"no image file at {tmp_path}"),
        ("a\0b.png", FileNotFoundError, "no image file at a"),
        (text, FileNotFoundError, "load_image_from_base64"),
        (f"{text}.png", FileNotFoundError, "no image file at iVBOR"),
        (f"data:image/png;base64,{text[:-3]}", ValueError, "not a readable data URL"),
        (f"data:image/png;base64,{text[:4000]}", ValueError, "is not a readable image"),
        (f"data:{text}", ValueError, "not a readable data URL"),
        (nobody, OSError, f"{nobody} cannot be fetched"),
        (f"{server}/none.png", OSError, f"{server}/none.png cannot be fetched (HTTP Error 404: Not Found)"),
        (f"{server}/short.png", OSError, f"{server}/short.png cannot be fetched"),
        ("http://", OSError, "http:// cannot be fetched"),
        ("http://a b/c.png", OSError, "http://a b/c.png cannot be fetched"),
        (b"", ValueError, "the image of 0 bytes is not a readable image (of no known format)"),
        (io.BytesIO(b"nothing"), ValueError, "the BytesIO is not a readable image"),
        (io.StringIO("text"), TypeError, "the StringIO is open as text: open it with mode 'rb'"),
        (Image.new("RGB", (0, 3)), ValueError, "has no pixels (0 x 3)"),
        (np.zeros((4, 4, 3), np.uint8), TypeError, "is a ndarray, not an image: give a path"),
        (None, TypeError, "is a NoneType, not an image"),
    ):
        with pytest.raises(kind) as caught:
            load_image(source)
        assert message in str(caught.value) and len(str(caught.value)) < 400, caught.value
    with pytest.raises(ValueError, match=r"^'a\.…?.*is no base64 text|the image of"):
        load_image_from_base64("a.b")


FORMATS = ("PNG", "GIF", "TIFF", "BMP", "JPEG", "WEBP", "ICO", "PPM", "TGA", "JPEG2000")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore")  # Pillow's, on what it finds in them
def test_damaged_files_are_refused_in_one_line_or_read(kind: str, tmp_path: Path):
    """Whatever is wrong in them: each byte of the first 200, and cuts; Pillow raises errors of many kinds."""
    content = encoded(picture(0, (24, 16)), kind)
    damaged = [content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :] for place in range(200)]
    damaged += [content[:place] for place in range(0, len(content), 1 + len(content) // 40)]
    refused = 0
    for file in damaged:
        try:
            load_image(file, name="cat")
        except ValueError as error:
            refused += 1
            assert str(error).startswith("cat ") and "\n" not in str(error) and len(str(error)) < 300
    assert refused > 20


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """More than twice the limit, which is 179 million; here that of a header."""
    header = b"P6 20000 10000 255\n"
    (tmp_path / "vast.ppm").write_bytes(header)
    with pytest.raises(ValueError, match=r"vast\.ppm is too large .*200000000 pixels\) exceeds limit of 178956970"):
        load_image(tmp_path / "vast.ppm")


def test_a_bad_picture_does_not_end_the_chat(make_checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)
    content = bytearray(encoded(picture(0)))
    content[content.index(b"IDAT") + 4 + 40] ^= 0xFF
    Path("torn.png").write_bytes(content)
    Path("head.gif").write_bytes(encoded(picture(0), "GIF")[:12])
    Path("vast.ppm").write_bytes(b"P6 20000 10000 255\n")
    picture(0).save("good.png")
    url = "data:image/png;base64," + base64.b64encode(encoded(picture(0))).decode()
    files = ("torn.png", "head.gif", "vast.ppm", ".", "", "~who/x.png", url[:2000], "https://127.0.0.1:9/cat.png")
    lines = [*(f"/image {file}" for file in files), "/image good.png", f"/image {url}", "And here?", ""]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    assert llava_cli(["--model-path", str(make_checkpoint()), "--device", "cpu", "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    assert "torn.png is not a readable image" in printed and "vast.ppm is too large" in printed
    assert "https://127.0.0.1:9/cat.png cannot be fetched" in printed
    assert "(32 visual)" in printed  # both good ones
    assert max(map(len, printed.splitlines()[1:])) < 400

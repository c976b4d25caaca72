"""Where images come from, what is said of those that cannot be read, and that none of them ends a chat."""

from __future__ import annotations

import base64
import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import encoded, picture
from llava.eval import run_llava
from llava.images import load_image
from llava.mm_utils import load_image_from_base64
from llava.serve.cli import main as llava_cli


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
def test_damaged_files_are_refused_in_one_line_or_read(kind: str):
    """Whatever is wrong in them: each byte of the first 200, and cuts; Pillow raises errors of many kinds."""
    content = encoded(picture(0, (24, 16)), kind)
    flips = [(place, bits) for place in range(200) for bits in (0x01, 0xFF)]
    damaged = [content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :] for place, bits in flips]
    damaged += [content[:place] for place in range(0, len(content), 1 + len(content) // 40)]
    refused = 0
    for file in damaged:
        try:
            load_image(file, name="cat")
        except ValueError as error:
            refused += 1
            assert str(error).startswith("cat ") and "\n" not in str(error) and len(str(error)) < 300
    assert refused > 20


def test_too_many_pixels(tmp_path: Path):
    """More than twice the limit, which is 179 million; here that of a header."""
    (tmp_path / "vast.ppm").write_bytes(b"P6 20000 10000 255\n")
    with pytest.raises(ValueError, match=r"vast\.ppm is too large .*200000000 pixels\) exceeds limit of 178956970"):
        load_image(tmp_path / "vast.ppm")


def test_a_bad_picture_does_not_end_the_chat(make_checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)
    content = bytearray(encoded(picture(0)))
    content[36] ^= 0xFF  # of the data's length: Pillow raises a SyntaxError
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

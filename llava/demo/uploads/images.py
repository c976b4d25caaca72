"""Images that a browser sends: their bytes in the request itself, so that the server neither writes nor opens files."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from PIL import Image

from llava.images import load_image

MAX_BYTES = 10 * 2**20  # of an image file
MAX_PIXELS = 40_000_000
MAX_IMAGES = 8  # of a conversation
MAX_TOTAL = 24 * 2**20  # bytes of a conversation's image files
_SHOWN, THUMBNAIL = 1024, 96  # pixels of the longest edge, as the page shows an image
_LONGEST_NAME = 60
# Those that Pillow decodes by itself: for EPS, say, it starts another program on the file.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")


class Visual(Protocol):
    """An image or a video of a conversation, as the page needs it.

    Attributes:
        name: for messages and labels.
    """

    name: str

    @property
    def size(self) -> int:
        """Bytes of the file."""

    @property
    def thumbnail(self) -> str:
        """Data URL of a small picture, for what is sent again with each word of an answer."""

    @property
    def shown(self) -> list[str]:
        """Data URL of a picture for the page, or one for each frame."""

    def open(self) -> Image.Image | list[Image.Image]:
        """The image, or the frames."""


@dataclass(frozen=True)
class Upload:
    """An image as its file's bytes: decoded anew where it is needed, since pixels take twenty times as much.

    Attributes:
        name: for messages and labels.
        data: the file.
    """

    name: str
    data: bytes

    def open(self) -> Image.Image:
        """The image as it is seen, upright and in RGB.

        Raises:
            ValueError: it is no image, is damaged, of another format than these, or has too many pixels.
        """
        if len(self.data) > MAX_BYTES:
            raise ValueError(
                f"{self.name} has {len(self.data) / 2**20:.1f} MB, more than {MAX_BYTES >> 20}: scale it down"
            )
        kind, (width, height) = _head(self.data)
        if kind is not None and kind not in _FORMATS:
            raise ValueError(f"{self.name} is of the format {kind}, which is not opened here: save it as PNG or JPEG")
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{self.name} has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million: scale it down"
            )
        return load_image(self.data, name=self.name)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.data)

    @cached_property
    def shown(self) -> list[str]:
        """Data URL of a picture for the page; at most 1024 pixels along an edge."""
        return [scaled(self.open(), _SHOWN)]

    @cached_property
    def thumbnail(self) -> str:
        """Data URL of a small picture, for what is sent again with each word of an answer."""
        return scaled(self.open(), THUMBNAIL)


def scaled(image: Image.Image, edge: int) -> str:
    """Data URL of a picture with so many pixels along its longest edge, or fewer; the image itself is scaled too."""
    image.thumbnail((edge, edge))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _head(data: bytes) -> tuple[str | None, tuple[int, int]]:
    """Format and pixels that a file says it has, read from its first bytes; None where it says nothing."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.format, image.size
    except Exception:  # whatever Pillow's readers raise: load_image says it
        return None, (0, 0)


def read_uploads(text: str, present: Sequence[Visual] = ()) -> list[Upload]:
    """Read the images of a request, and check that they can be opened.

    Args:
        text: JSON list of ``{"name": …, "data": "data:…;base64,…"}``. Nothing in it is taken for a path or an address.
        present: images and videos that the conversation has already.

    Raises:
        ValueError: it is something else, one image cannot be read, or they are too many or too large.
    """
    uploads = [Upload(name, data) for name, data in read_files(text, present)]
    for upload in uploads:
        upload.open()
    return uploads


def read_files(text: str, present: Sequence[Visual]) -> list[tuple[str, bytes]]:
    """Name and content of each file of a request, whatever is in it.

    Raises:
        ValueError: the text is something else, or the files are too many or too large for one conversation.
    """
    try:
        files = [_file(entry) for entry in json.loads(text)]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError("the upload is no list of files with a name and base64 data: send it from the page") from error
    if (number := len(present) + len(files)) > MAX_IMAGES:
        raise ValueError(f"{number} images or videos are more than {MAX_IMAGES} in one conversation: begin a new one")
    if (total := sum(each.size for each in present) + sum(len(data) for _, data in files)) > MAX_TOTAL:
        raise ValueError(
            f"the conversation's files have {total / 2**20:.1f} MB, more than {MAX_TOTAL >> 20}: scale them down"
        )
    return files


def _file(entry: dict[str, Any]) -> tuple[str, bytes]:
    name = " ".join(str(entry["name"]).split())[-_LONGEST_NAME:] or "the file"
    head, comma, data = entry["data"].partition(",")
    try:
        if not (comma and head.startswith("data:") and head.endswith(";base64")):
            raise binascii.Error
        return name, base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} came without base64 data: send it from the page") from error

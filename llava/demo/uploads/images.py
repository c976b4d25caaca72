"""Images that a browser sends: their bytes in the request itself, so that the server neither writes nor opens files."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from llava.images import load_image

MAX_BYTES = 10 * 2**20  # of an image file
MAX_PIXELS = 40_000_000
MAX_IMAGES = 8  # of a conversation
MAX_TOTAL = 24 * 2**20  # bytes of a conversation's image files
_SHOWN, _THUMBNAIL = 1024, 96  # pixels of the longest edge, as the page shows an image
_LONGEST_NAME = 60
# Those that Pillow decodes by itself: for EPS, say, it starts another program on the file.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")


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

    @cached_property
    def shown(self) -> str:
        """Data URL of a picture for the page; at most 1024 pixels along an edge."""
        return self._scaled(_SHOWN)

    @cached_property
    def thumbnail(self) -> str:
        """Data URL of a small picture, for what is sent again with each word of an answer."""
        return self._scaled(_THUMBNAIL)

    def _scaled(self, edge: int) -> str:
        image = self.open()
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


def read_uploads(text: str, present: Sequence[Upload] = ()) -> list[Upload]:
    """Read the images of a request, and check that they can be opened.

    Args:
        text: JSON list of ``{"name": …, "data": "data:…;base64,…"}``. Nothing in it is taken for a path or an address.
        present: images that the conversation has already.

    Raises:
        ValueError: it is something else, one image cannot be read, or they are too many or too large.
    """
    try:
        uploads = [_upload(entry) for entry in json.loads(text)]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            "the upload is no list of images with a name and base64 data: send it from the page"
        ) from error
    everything = [*present, *uploads]
    if len(everything) > MAX_IMAGES:
        raise ValueError(f"{len(everything)} images are more than {MAX_IMAGES} in one conversation: begin a new one")
    if (total := sum(len(upload.data) for upload in everything)) > MAX_TOTAL:
        raise ValueError(
            f"the conversation's images have {total / 2**20:.1f} MB, more than {MAX_TOTAL >> 20}: scale them down"
        )
    for upload in uploads:
        upload.open()
    return uploads


def _upload(entry: dict[str, Any]) -> Upload:
    name = " ".join(str(entry["name"]).split())[-_LONGEST_NAME:] or "the image"
    head, comma, data = entry["data"].partition(",")
    try:
        if not (comma and head.startswith("data:") and head.endswith(";base64")):
            raise binascii.Error
        return Upload(name, base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise ValueError(f"{name} came without base64 data: send it from the page") from error

"""The one loader of images: a file, an address, bytes or a PIL image into 8-bit RGB, by one of two rules.

As it is *seen*: turned upright as its EXIF orientation says, what is transparent on white. Chat, figures and
``process_images`` have this rule. As it is *stored*: orientation ignored and transparency dropped, which is how LLaVA
reads the images of its benchmarks and of its training data; evaluation and training keep it, for comparison's sake.

Both scale 16-bit grey to 8 bits, and refuse pixels whose black and white nobody knows.
"""

from __future__ import annotations

import io
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

Source = str | Path | bytes | BinaryIO | Image.Image

AS_STORED = "images as stored (EXIF orientation ignored, transparency dropped, as in LLaVA)"  # for records of a run

_LONGEST_NAME, _SHOWN = 300, 60  # characters: longer texts are hardly names, of which so many are shown
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Source, *, as_stored: bool = False, name: str | None = None) -> Image.Image:
    """Open an image as 8-bit RGB; of several frames, the first.

    Args:
        source: path, http(s) address, data URL, the bytes of an image file, a binary file object, or a PIL image.
        as_stored: ignore EXIF's orientation and drop transparency, as LLaVA does for benchmarks and training; else the
            image is turned upright and put on white.
        name: what messages call it (default: path, address or kind).

    Returns:
        Mode RGB. 16-bit grey keeps the high byte of each value, as Pillow has it for 16-bit colours. It says nothing
        about orientation or transparency any more, so that nobody applies them again.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: an address cannot be fetched.
        TypeError: the source is something else.
        ValueError: it is no image, is damaged or too large, or its pixels have no certain black and white.
    """
    name = name or _name_of(source)
    if isinstance(source, Image.Image):
        return _open(source, name, as_stored)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(io.BytesIO(source), name, as_stored)
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://", "data:")):
        return _open(io.BytesIO(_fetched(source, name)), name, as_stored)
    if isinstance(source, str | Path):
        return _open(existing_file(source, name), name, as_stored)
    if isinstance(source, io.TextIOBase):
        raise TypeError(f"{name} is open as text: open it with mode 'rb'")
    if hasattr(source, "read"):
        return _open(source, name, as_stored)
    raise TypeError(
        f"{name} is a {type(source).__name__}, not an image: give a path, an address, a data URL, bytes, a binary file "
        "object or a PIL image"
    )


def shorten(text: str) -> str:
    """A path or address for a message; of one that is far too long (base64), its beginning."""
    if len(text) <= (_SHOWN if text[:5].lower() == "data:" else _LONGEST_NAME):
        return text
    return f"{text[:_SHOWN]}… ({len(text)} characters)"


def existing_file(path: str | Path, name: str) -> Path:
    """The path of a file that is there.

    Raises:
        FileNotFoundError: it is not, or the path is no path at all (base64); the message has ``name``.
    """
    try:
        found = Path(path).is_file()
    except (OSError, ValueError):  # longer than names of files can be, or with a null in it
        found = False
    if found:
        return Path(path)
    hint = ": is it base64? That is for llava.mm_utils.load_image_from_base64" if len(str(path)) > _LONGEST_NAME else ""
    raise FileNotFoundError(f"no image file at {name}{hint}")


def _name_of(source: object) -> str:
    if isinstance(source, str | Path):
        return shorten(str(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the image of {len(source)} bytes"
    file = getattr(source, "filename", None) or getattr(source, "name", None)
    return shorten(file) if isinstance(file, str) else f"the {type(source).__name__}"


def _fetched(address: str, name: str) -> bytes:
    try:
        with urlopen(address, timeout=30) as response:
            return response.read()
    except (OSError, HTTPException, ValueError) as error:
        if address[:5].lower() == "data:":
            raise ValueError(f"{name} is not a readable data URL ({error}): it ends in ;base64,…") from error
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise OSError(f"{name} cannot be fetched ({reason}): check the address and the connection") from error


def _open(data: Path | BinaryIO | Image.Image, name: str, as_stored: bool) -> Image.Image:
    try:
        if isinstance(data, Image.Image):
            return _rgb(data, name, as_stored)
        with Image.open(data) as image:
            return _rgb(image, name, as_stored)
    except _RefusedError:
        raise
    except Image.DecompressionBombError as error:
        size = str(error).partition(",")[0]
        raise ValueError(
            f"{name} is too large to be read ({size}): scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust "
            "it"
        ) from error
    except Exception as error:  # Pillow's readers of damaged files raise whatever happens to them
        unknown = isinstance(error, UnidentifiedImageError)  # its own words have the whole path, or a buffer's address
        reason = "of no known format" if unknown else str(error) or type(error).__name__
        raise ValueError(
            f"{name} is not a readable image ({reason}): fetch it again, or give a whole PNG, JPEG, WebP … file"
        ) from error


class _RefusedError(ValueError):
    """The image can be read, and is of no use."""


def _rgb(image: Image.Image, name: str, as_stored: bool) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise _RefusedError(f"{name} has no pixels ({image.width} x {image.height}): give another image")
    turn = None if as_stored else _TURNS.get(_orientation(image))
    transparent = image.has_transparency_data and not as_stored
    if image.mode == "RGB" and turn is None and not (transparent or as_stored):
        return image.copy() if isinstance(image, ImageFile.ImageFile) else image
    image = _eight_bits(image, name)
    if turn is not None:
        image = image.transpose(turn)
    if transparent:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image.convert("RGB")
    image.info = {}
    return image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged notes beside a picture that may be whole
        return None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The image; one with more bits in 8, with the transparency that its file has noted."""
    if not image.mode.startswith(("I", "F")):
        return image
    # Of the modes with 32 bits, only that of a PGM is certain: Pillow scales it to 65535.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):
        raise _RefusedError(
            f"{name} has pixels of mode {image.mode} (32-bit {'floats' if image.mode == 'F' else 'integers'}), and "
            "nothing says which value is white: scale them to 0…255 and convert or save them as 8-bit grey"
        )
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey

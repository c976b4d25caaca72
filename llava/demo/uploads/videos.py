"""Videos that a browser sends: only the frames that a model sees of them are kept."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from llava.demo.uploads.images import MAX_PIXELS, THUMBNAIL, Visual, read_files, scaled
from llava.video import FRAMES, Limits, read_frames

MAX_BYTES = 20 * 2**20  # of a video file
MAX_SECONDS = 60
MAX_FRAMES = 32  # that a model is given of a video
_SHOWN = 512  # pixels of the longest edge, as the page shows a frame
_OPENED = {"frames": 3600, "frame_pixels": 1920 * 1088, "pixels": 2 * 10**9}  # limits of what is decoded: some seconds
# What a file begins with, or what follows its first four bytes, and ffmpeg's name of the format.
_FORMATS = {b"ftyp": "mov", b"\x1aE\xdf\xa3": "matroska", b"GIF8": "gif"}


@dataclass(frozen=True)
class Clip:
    """The frames of a video.

    Attributes:
        name: for messages and labels.
        size: bytes of the file.
        files: of each frame a PNG file, which takes less than its pixels; the same one where a frame comes again.
        pixels: of all frames together.
    """

    name: str
    size: int
    files: tuple[bytes, ...] = field(repr=False)
    pixels: int

    def open(self) -> list[Image.Image]:
        """The frames, as :func:`llava.video.read_frames` reads them."""
        return [_opened(file) for file in self.files]

    @cached_property
    def shown(self) -> list[str]:
        """Data URL of a picture for each frame; at most 512 pixels along an edge."""
        return [scaled(frame, _SHOWN) for frame in self.open()]

    @cached_property
    def thumbnail(self) -> str:
        """Data URL of a small picture of the frame in the middle."""
        return scaled(_opened(self.files[len(self.files) // 2]), THUMBNAIL)


def read_clips(text: str, frames: float, present: Sequence[Visual] = ()) -> list[Clip]:
    """Read the videos of a request: evenly spaced frames, as ``visionzip chat --video --frames`` has them.

    Args:
        text: as :func:`llava.demo.uploads.images.read_uploads` takes it.
        frames: of each video. With 8, as without the flag, shorter videos repeat some.
        present: images and videos that the conversation has already.

    Raises:
        ValueError: the text is something else, a video cannot be read or has too few frames, there are too many of
            them, or they are too large or too long.
        ImportError: PyAV is not installed.
    """
    if not isinstance(frames, int | float) or frames != int(frames) or not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"{frames} frames of each video are outside 1 to {MAX_FRAMES}")
    clips = [_clip(name, data, int(frames)) for name, data in read_files(text, present)]
    total = sum(clip.pixels for clip in [*present, *clips] if isinstance(clip, Clip))
    if total > MAX_PIXELS:
        raise ValueError(
            f"the frames of the conversation's videos have {total / 1e6:.0f} million pixels, more than "
            f"{MAX_PIXELS // 10**6}: take fewer frames, or scale the videos down"
        )
    return clips


def _clip(name: str, data: bytes, count: int) -> Clip:
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"{name} has {len(data) / 2**20:.1f} MB, more than {MAX_BYTES >> 20}: cut it, or scale it down"
        )
    kind = _FORMATS.get(data[4:8]) or _FORMATS.get(data[:4])
    if kind is None:
        raise ValueError(f"{name} is no video of the formats MP4, WebM and GIF: save it as one of them")
    limits = Limits(kind, MAX_SECONDS, **_OPENED)
    frames = read_frames(data, name, count, repeat=count == FRAMES, limits=limits)
    files = {id(frame): frame for frame in frames}
    files = {place: _png(frame) for place, frame in files.items()}
    return Clip(name, len(data), tuple(files[id(frame)] for frame in frames), sum(f.width * f.height for f in frames))


def _png(frame: Image.Image) -> bytes:
    file = io.BytesIO()
    frame.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _opened(file: bytes) -> Image.Image:
    with Image.open(io.BytesIO(file)) as frame:
        return frame.convert("RGB")

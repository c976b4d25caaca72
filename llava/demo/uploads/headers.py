"""What the header of an MP4 file would have ffmpeg make in memory as soon as it is opened, before any of our limits."""

from __future__ import annotations

import re
import struct

# A minute of sound at 96 kHz, each of whose samples has an entry of 24 bytes in ffmpeg's index.
MAX_SAMPLES = 6_000_000
# Tables that need no bytes for their entries: samples of one size, and those of a fragment. Matches may overlap.
_COUNTS = re.compile(rb"(?=(?:stsz.{8}|trun.{4})(.{4}))", re.DOTALL)
_PACKED = re.compile(rb"cmov.{4}dcom", re.DOTALL)


def check_header(name: str, data: bytes) -> None:
    """Check that opening an MP4 file takes no more memory than its size lets expect.

    Args:
        name: for messages.
        data: the file.

    Raises:
        ValueError: its header is compressed (ffmpeg made 1.4 GB of 1 MB), or claims more samples than
            :data:`MAX_SAMPLES` (60 million took 4 GB).
    """
    if _PACKED.search(data):
        raise ValueError(
            f"{name} has a compressed header, which is opened before its size is known: save it as MP4 again"
        )
    header = _without_media(data)
    if any(kind in header for kind in (b"moof", b"sidx", b"mfra")):  # these may point to anywhere
        header = data
    samples = sum(int.from_bytes(count, "big") for count in _COUNTS.findall(header))
    if samples > MAX_SAMPLES:
        raise ValueError(
            f"{name} says that it has {samples} samples of pictures and sound, more than {MAX_SAMPLES}: cut it, or "
            "save it as MP4 again"
        )


def _without_media(data: bytes) -> bytes:
    """Leave out the samples themselves (``mdat``), in which anything may stand, by the sizes of the outermost atoms."""
    pieces, at = [], 0
    while at + 16 <= len(data):
        size, kind, long = struct.unpack_from(">I4sQ", data, at)
        size = {0: len(data) - at, 1: long}.get(size, size)
        if size < 8:
            break
        if kind != b"mdat":
            pieces.append(data[at : at + size])
        at += size
    return b"".join([*pieces, data[at:]])

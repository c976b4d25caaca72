"""Checksums that tell whether answers on disk can stay: of the images and videos that they are about.

Large files are sampled, so that a start takes seconds. Times of files are not looked at: a copy of the data, or the
other machine of a run, has its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava.storage.fingerprint import checksum

from ..records import Question, Visual

# Of larger files than the first, samples are read, so far apart, and so long (bytes).
_IMAGES = (64 << 10, 64 << 10, 4 << 10)
_SAMPLES = 32  # of an image or a video at most, about
_READERS = 16  # files at a time: on a network's disk each takes its time


def checksum_of_bytes(content: bytes) -> str:
    """Checksum of what is in memory already."""
    return hashlib.sha256(content).hexdigest()


def checksum_of_image(path: Path) -> str:
    """Checksum of an image's or a video's file, of its length and a few samples unless it is small.

    Of a compressed image or video, what is another picture has another length or another end. A file that is not there
    has a checksum of its own.
    """
    large, stride, sample = _IMAGES
    try:
        return checksum(path, large, max(stride, path.stat().st_size // _SAMPLES), sample)
    except OSError:
        return "unreadable"


def contents_of(questions: Sequence[Question]) -> list[str]:
    """What the images and videos of each question hold, as a checksum; those that questions share are read once."""
    visuals = {visual.key: visual for question in questions for visual in question.visuals}
    with ThreadPoolExecutor(_READERS) as readers:
        found = dict(zip(visuals, readers.map(_content, visuals.values()), strict=True))
    joined = ("\n".join(found[visual.key] for visual in question.visuals) for question in questions)
    return [checksum_of_bytes(content.encode())[:16] for content in joined]


def _content(visual: Visual) -> str:
    if visual.content is not None:
        return visual.content()
    return "" if visual.path is None else checksum_of_image(visual.path)

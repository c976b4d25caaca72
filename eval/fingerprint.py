"""Checksums that tell whether answers on disk can stay: of the weights that gave them, and of the images asked about.

Large files are sampled, so that a start takes seconds. Times of files are not looked at: a copy of the data, or the
other machine of a run, has its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from llava.model.loading import find_file

if TYPE_CHECKING:
    from .benchmark import Question, Visual

# Of larger files than the first, samples are read, so far apart, and so long (bytes).
_WEIGHTS = (64 << 20, 4 << 20, 64 << 10)
_IMAGES = (64 << 10, 64 << 10, 4 << 10)
_SAMPLES = 32  # of an image or a video at most, about
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model")
_READERS = 16  # files at a time: on a network's disk each takes its time


def fingerprint(*paths: str) -> str:
    """A checksum of the files in some checkpoints (see :func:`checksum`); of one on the hub, its revision."""
    parts = []
    for path in paths:
        if Path(path).is_dir():
            files = sorted(file for file in Path(path).rglob("*") if file.suffix in _MODEL_FILES and file.is_file())
            parts += [f"{file.relative_to(path)} {checksum(file)}" for file in files]
        else:
            config = find_file(path, "config.json")
            parts.append(f"{path} {Path(config).parent.name if config else ''}")
    return checksum_of_bytes("\n".join(parts).encode())


def checksum(path: Path, large: int = _WEIGHTS[0], stride: int = _WEIGHTS[1], sample: int = _WEIGHTS[2]) -> str:
    """Checksum of a file; of a large one's length and samples, as all bytes of a 7B take half a minute at each start.

    A tensor of 4 MiB that has changed is noticed, so that another training of the same model is; a copy is the same.

    Args:
        path: the file.
        large: bytes from which on samples are read.
        stride: bytes from one sample to the next; there is one at the end, too.
        sample: bytes of each.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= large:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for start in (*range(0, size - sample, stride), size - sample):
            file.seek(start)
            digest.update(file.read(sample))
        return digest.hexdigest()


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

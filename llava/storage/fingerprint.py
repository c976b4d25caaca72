"""Checksums by which weights are known again, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llava.model.checkpoints.files import find_file

# Of larger files than the first, samples are read, so far apart, and so long (bytes).
_WEIGHTS = (64 << 20, 4 << 20, 64 << 10)
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model")


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
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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

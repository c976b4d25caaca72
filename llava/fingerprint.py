"""Checksums by which weights are known again, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llava.model.loading import find_file

_LARGE, _STRIDE, _SAMPLE = 64 << 20, 4 << 20, 64 << 10  # bytes: of such files samples are read, so far apart, so long
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


def checksum(path: Path) -> str:
    """Checksum of a file; of a large one's length and samples, as all bytes of a 7B take half a minute at each start.

    A tensor of 4 MiB that has changed is noticed, so that another training of the same model is; a copy is the same.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= _LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for start in (*range(0, size - _SAMPLE, _STRIDE), size - _SAMPLE):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
        return digest.hexdigest()

"""Visual tokens in files: what ``--cache_visual_tokens`` writes and reads. See ``llava.train.cache``.

A folder has, of each process W that has written into it:

    tokens-W.bin     of each image, indices (T, N) int32, sizes (T, N) float32 and tokens (T, N, D)
    index-W.jsonl    a line for each image: path, size and times of its file, hash of its content, place, checksum

An image's line is written after its tokens, and no two processes write to one file: a process that is killed loses the
image that it was at, and processes and runs cannot disturb each other.
"""

from __future__ import annotations

import json
import uuid
import zlib
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.storage.files import append, write_atomically, writing

_SAFE = "The images that are encoded stay so: start again, or give cache_visual_tokens a folder on another disk"
Stamp = tuple[int, int, int]  # size in bytes, and times of change of content and of anything in ns


class DamagedCacheError(OSError):
    """A file of the cache is not as it was written: no error of the record, which is not skipped for it."""


def stamp_of(path: str) -> Stamp:
    """What tells that a file is still the one that it was, without reading it.

    Raises:
        OSError: there is no such file.
    """
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class Entry:
    """Where an image's tokens are.

    Attributes:
        digest: hash of the image file's content.
        size: (width, height) of the image in pixels.
        file: name of the file in the cache's folder.
        offset: of the first byte.
        shape: (T, N, D) of the tokens.
        zipped: whether there are indices.
        sized: whether there are sizes.
        checksum: CRC-32 of the bytes.
    """

    digest: str
    size: tuple[int, int]
    file: str
    offset: int
    shape: tuple[int, int, int]
    zipped: bool
    sized: bool
    checksum: int

    def lengths(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """Bytes of the indices, of the sizes, and of the tokens."""
        tiles, tokens, width = self.shape
        each = 4 * tiles * tokens
        return each * self.zipped, each * self.sized, tiles * tokens * width * dtype.itemsize


class Index:
    """All images of a cache; one whose tokens are not there, or whose line is damaged, is left out.

    Attributes:
        by_path: by path and stamp.
        by_digest: by the hash of the content.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.by_path: dict[tuple[str, Stamp], Entry] = {}
        self.by_digest: dict[str, Entry] = {}
        there = {file.name: file.stat().st_size for file in folder.glob("tokens-*.bin")}
        for file in folder.glob("index-*.jsonl"):
            for line in file.read_text(errors="replace").splitlines():
                try:
                    path, stamp, values = json.loads(line)
                    entry = Entry(**{**values, "size": tuple(values["size"]), "shape": tuple(values["shape"])})
                    if entry.offset + sum(entry.lengths(dtype)) > there.get(entry.file, 0):
                        continue
                except (ValueError, TypeError, KeyError):  # damaged, or cut short as its process was killed
                    continue
                self.by_path[path, tuple(stamp)] = entry
                self.by_digest[entry.digest] = entry


class Writer:
    """Adds images to a cache, in files of its own, which are made when there is something to write.

    Args:
        folder: of the cache.
        recipe: what its tokens depend on; written beside them, for people to read.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder = folder
        self.recipe = recipe
        self.name = uuid.uuid4().hex[:12]
        self._files: dict[str, FileIO] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def add_tokens(self, digest: str, size: tuple[int, int], encoded: EncodedImage) -> Entry:
        """Write an image, on the CPU. It counts once a line names it.

        Raises:
            OSError: the disk is full.
        """
        file = self._open("tokens-{}.bin")
        kept = None if encoded.kept is None else encoded.kept.to(torch.int32)
        parts = [part for part in (kept, encoded.sizes, encoded.tokens) if part is not None]
        data = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        there = kept is not None, encoded.sizes is not None
        shape = tuple(encoded.tokens.shape)
        entry = Entry(digest, size, Path(file.name).name, file.tell(), shape, *there, zlib.crc32(data))
        append(file, data, _SAFE)
        return entry

    def add_line(self, path: str, stamp: Stamp, entry: Entry) -> None:
        """Say where the tokens of the image at ``path`` are.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps([path, stamp, asdict(entry)]) + "\n"
        append(self._open("index-{}.jsonl"), line.encode(), _SAFE)

    def _open(self, name: str) -> FileIO:
        if not self._files:
            write_atomically(self.folder / "recipe.json", json.dumps(self.recipe, indent=1), _SAFE, shared=True)
        if name not in self._files:
            path = self.folder / name.format(self.name)
            with writing(path, _SAFE):
                self._files[name] = path.open("xb", buffering=0)
        return self._files[name]


class CachedImages:
    """A data set's images, encoded; memory-mapped.

    Args:
        folder: of the cache.
        dtype: of the tokens.
        entries: where they are, by the image's name in the records.
        problems: what is wrong with the images that could not be read.
        blank: the image that text-only samples get, so that every process uses the projector.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        entries: dict[str, Entry],
        problems: dict[str, str],
        blank: EncodedImage,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.entries = entries
        self.problems = problems
        self.blank = blank
        self._maps: dict[str, np.memmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a data loader's processes map the files themselves

    def sample(self, name: str | None) -> tuple[EncodedImage, tuple[int, int]]:
        """An image's tokens, and its (width, height) in pixels; None is the image of a text-only sample.

        Raises:
            ValueError: the image could not be read.
            DamagedCacheError: the cache's file is damaged.
        """
        if name is None:
            return self.blank, (1, 1)
        if name in self.problems:
            raise ValueError(self.problems[name])
        entry = self.entries[name]
        lengths = entry.lengths(self.dtype)
        data = self._map(entry.file)[entry.offset : entry.offset + sum(lengths)].copy()
        if zlib.crc32(data) != entry.checksum:
            raise DamagedCacheError(
                f"the cached tokens of {name} are damaged: delete {self.folder / entry.file} and start again; the "
                "images in it are encoded anew, and training goes on at its last checkpoint"
            )
        indices, sizes, tokens = torch.from_numpy(data).split(lengths)
        encoded = EncodedImage(
            tokens.view(self.dtype).view(entry.shape),
            indices.view(torch.int32).view(entry.shape[:2]).long() if entry.zipped else None,
            sizes.view(torch.float32).view(entry.shape[:2]) if entry.sized else None,
        )
        return encoded, entry.size

    def _map(self, file: str) -> np.ndarray:
        if file not in self._maps:
            try:
                self._maps[file] = np.memmap(self.folder / file, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise DamagedCacheError(f"{self.folder / file} is gone or empty ({error}): start again") from error
        return self._maps[file]

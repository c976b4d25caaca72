"""Folders that are whole or not there: what a command writes appears under its name when it is done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.storage.files import sync, writing


def check_absent(path: str | Path, label: str) -> None:
    """Check that a folder to be written does not exist, or is empty.

    Raises:
        ValueError: it exists, or is where a disk is mounted, which cannot be replaced.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{label} exists: choose a new folder, or remove it")
    if path.is_mount():
        raise ValueError(f"{label} is a mount point: choose a new folder in it")


def check_room(path: str | Path, size: int, label: str, cure: str) -> None:
    """Check that ``size`` bytes fit where a folder is to be written.

    Raises:
        OSError: they do not, or a file is in the way.
    """
    nearest = next(part for part in Path(path).resolve().parents if part.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{label}: {nearest} is a file, not a folder; choose another one")
    if (free := shutil.disk_usage(nearest).free) < size:
        raise OSError(f"{label} needs {size / 1e9:.1f} GB but {nearest} has {free / 1e9:.1f} GB free: {cure}")


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files go into another one, new or not, when all of them are there.

    Raises:
        OSError: a file cannot be written; the folder is then as it was.
    """
    unfinished = folder / "unfinished.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with writing(folder, "What was there is as it was"):
            unfinished.mkdir(parents=True)
            yield unfinished
            files = list(unfinished.iterdir())
            for file in files:
                sync(file)
            for file in files:
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def whole_folder(path: str | Path, label: str) -> Iterator[Path]:
    """A folder to write to, which gets its name at the end of the block: a folder of that name is a whole one.

    Until then it is called ``name.partial``. An error removes it; what a killed run has left, the next one does.

    Raises:
        OSError: a file cannot be written.
    """
    path = Path(path).resolve()  # a link stays one, to the new folder
    unfinished = path.with_name(path.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with writing(label, "Nothing is left of it"):
            unfinished.mkdir(parents=True)
            yield unfinished
            if path.exists():
                path.rmdir()
            unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

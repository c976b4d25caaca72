"""Videos as benchmarks have them: files by name, also in zip archives."""

from __future__ import annotations

import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.benchmark import Visual
from llava.video import FRAMES, read_frames

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")  # Video-LLaVA looks for the first four, in this order


def clip(path: Path, frames: int = FRAMES) -> Visual:
    """A video file; it is read when its turn comes.

    Args:
        path: the file.
        frames: how many of its frames the model gets, see :func:`read_frames`.
    """
    return Visual(str(path), partial(read_frames, path, str(path), frames), frames, path)


def videos_below(folder: Path) -> dict[str, Visual]:
    """All videos in a folder, in its subfolders and in zip archives there, by file name, with and without extension.

    Of several with one name the first of :data:`EXTENSIONS` counts. Videos in archives need not be unpacked.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: an archive is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: `python -m eval prepare` says where it comes from")
    found: list[tuple[int, str, str, Visual]] = []

    def add(place: str, visual: Visual) -> None:
        name = Path(place).name
        if (suffix := Path(place).suffix.lower()) in EXTENSIONS and not name.startswith("._"):  # macOS writes those
            found.append((EXTENSIONS.index(suffix), place, name, visual))

    for path in folder.rglob("*"):
        add(str(path), clip(path))
        if path.suffix.lower() == ".zip":
            for member in _members(path):
                key = f"{path}/{member}"
                add(key, Visual(key, partial(_read_member, path, member), FRAMES))
    found.sort(key=lambda each: each[:2])
    named: dict[str, Visual] = {}
    for _, _, name, visual in found:
        named.setdefault(Path(name).stem, visual)
        named.setdefault(name, visual)
    return named


def _members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as file:
            return file.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged ({error}): fetch it again") from error


def _read_member(archive: Path, member: str) -> list[Image.Image]:
    try:
        with zipfile.ZipFile(archive) as file:
            content = file.read(member)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{member} in {archive} is damaged ({error}): fetch it again") from error
    return read_frames(content, f"{archive}/{member}")

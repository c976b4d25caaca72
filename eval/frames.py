"""Videos: their evenly spaced frames by PyAV, and the files that they are in, by name (also in zip archives)."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.benchmark import Visual

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8  # of each video, where nothing else is asked for: Video-LLaVA's
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")  # Video-LLaVA looks for the first four, in this order


def clip(path: Path, frames: int = FRAMES) -> Visual:
    """A video file; it is read when its turn comes.

    Args:
        path: the file.
        frames: how many of its frames the model gets, see :func:`read_frames`.
    """
    return Visual(str(path), partial(read_frames, path, str(path), frames), frames, path)


def read_frames(source: Path | bytes, name: str, count: int = FRAMES) -> list[Image.Image]:
    """RGB frames of a video, evenly spaced from the first to the last: ``np.linspace(0, n - 1, count, dtype=int)``.

    The n frames are those that can be decoded, whatever the file says and however long each is shown; where there are
    fewer than asked for, some come more than once. No more than ``count`` of them are held at a time.

    Args:
        source: the file, or what is in it: anything that ffmpeg reads.
        name: for messages.
        count: how many.

    Returns:
        ``count`` images of the video's size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, it has no video, or the video has no frames; the message has the name.
    """
    import av  # noqa: PLC0415 - of the extra `eval`; listing benchmarks does without

    try:
        packets = _count_packets(source, name)
        frames, total = _decode(source, name, _spread(packets, count), "AUTO")
        if total != packets:
            # A packet need not be a frame, as with edit lists. Or it is damaged: ffmpeg's threads may pass over that.
            _, total = _decode(source, name, [], "NONE")
            frames, _ = _decode(source, name, _spread(total, count), "NONE")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no video {name}") from None
    except (av.error.FFmpegError, OSError) as error:  # OSError: ffmpeg seeks before the start of some
        raise ValueError(f"{name} cannot be read as a video ({error.strerror}): fetch it again") from error
    if not total:
        raise ValueError(f"{name} has no frames: fetch it again")
    return [frames[index] for index in _spread(total, count)]


def _spread(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, count, dtype=int).tolist() if total else []


def _count_packets(source: Path | bytes, name: str) -> int:
    with _opened(source, name) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def _decode(source: Path | bytes, name: str, wanted: Iterable[int], threads: str) -> tuple[dict[int, Image.Image], int]:
    """The frames at some places, and how many frames there are."""
    places, frames, total = set(wanted), {}, 0
    with _opened(source, name) as (container, stream):
        stream.thread_type = threads
        for frame in container.decode(stream):
            if total in places:
                frames[total] = frame.to_image()
            total += 1
    return frames, total


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    import av  # noqa: PLC0415

    # A file object: ffmpeg would take some names for patterns or protocols.
    with (
        source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file,
        av.open(file, metadata_errors="ignore") as container,
    ):
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError(f"{name} has no video stream: fetch it again")
        yield container, stream


# Videos by name


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

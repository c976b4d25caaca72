"""Files that are whole, or as they were: the one way to write them, and what is said when that fails."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors (Rust's words for the same three) and torch say where a disk takes no more.
_NO_ROOM = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|inline_container|iostream error")


class WriteError(OSError):
    """Something cannot be written; the message has what, why, what is safe, and how to go on."""


@contextmanager
def writing(what: str | Path, safe: str) -> Iterator[None]:
    """Give errors of writing in the block a message that a user can act on.

    Args:
        what: is written: a path, or words with one.
        safe: a sentence on what is whole whatever happens, and maybe on how to go on.

    Raises:
        WriteError: something cannot be written.
    """
    try:
        yield
    except WriteError:  # of a file within, whose name says more
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        room = " Make room, or choose another disk." if full_disk(error) or _NO_ROOM.search(str(error)) else ""
        raise WriteError(f"cannot write {what}: {_reason(error)}. {safe}.{room}") from error


def write_atomically(
    path: Path, content: str | bytes | Callable[[Path], object], safe: str = "", *, shared: bool = False
) -> None:
    """Write a file, and the folders above it, so that it is there whole or as it was before.

    Args:
        path: the file.
        content: text (UTF-8), bytes, or what writes them to a path, which has another name than the file.
        safe: of messages, see :func:`writing`; by default that the file is as it was before.
        shared: other processes may write the same file at the same time; the last one's stays.

    Raises:
        WriteError: it cannot be written; nothing is left of it.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    with writing(path, safe or "It is as it was before, or not there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if callable(content):
                content(unfinished)
            else:
                unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(unfinished)
            unfinished.replace(path)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def append(file: FileIO, data: bytes, safe: str) -> None:
    """Write all of ``data`` at the end of an unbuffered file that no other process writes to, or nothing.

    Raises:
        WriteError: it cannot be written; ``safe`` is as in :func:`writing`.
    """
    end, rest = file.seek(0, os.SEEK_END), memoryview(data)
    with writing(file.name, safe):
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def sync(path: Path) -> None:
    """Put a file on its disk; some say only now that they are full."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def full_disk(error: BaseException | None) -> OSError | None:
    """The error among those that led to one which says that a disk, or the room allowed on it, is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Exception) -> str:
    """What went wrong, in one line; with the file that stands in the way, if it is a folder of the path."""
    if isinstance(error, OSError) and error.strerror:
        named = error.filename if isinstance(error.filename, str) and not error.filename.endswith(".partial") else None
        return f"{error.strerror} ({named})" if named else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Locks on what one process at a time may write: an answers file, the folder of a training."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_NAME = "run.lock"


def lock(file: IO[Any], name: str | Path, option: str) -> None:
    """Lock an open file for this process; the system lifts it when the file is closed or the process ends, however.

    Args:
        file: it must be open for writing (network file systems ask for that).
        name: what is written to, for the message.
        option: the flag with which its user can choose another one.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"another process is writing to {name}: wait for it, or choose another {option}"
        ) from error


@contextmanager
def locked_folder(folder: Path, option: str) -> Iterator[None]:
    """Have a folder for this process alone during the block, and make it; left empty, it is taken away again.

    Args:
        folder: it need not exist.
        option: as for :func:`lock`.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made or written to.
    """
    path = folder / _NAME
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    with _locked(path, folder, option):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still locked: whoever has opened it meanwhile sees that it is gone
            with suppress(OSError):  # one of them is not empty
                for part in made:
                    part.rmdir()


@contextmanager
def _locked(path: Path, folder: Path, option: str) -> Iterator[None]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            lock(file, folder, option)
            if _is_there(file, path):  # else who had it before has just taken the file away
                yield
                return


def _is_there(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

"""Reading benchmarks' data: files of LLaVA's layout, rows from the hub or of parquet files, images and video frames."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from llava.images import load_image

from .. import COMMAND
from ..records import Visual
from .fingerprint import checksum_of_bytes

Found = TypeVar("Found")


def read_json(path: Path) -> Any:
    """A json file's content.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no json ({error}): fetch it again") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one on each line; empty lines are passed over.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is no json object; the message has its number.
    """
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is damaged ({error}): fetch or make the file again") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is {type(row).__name__}, not a json object")
        rows.append(row)
    return rows


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: `{COMMAND} prepare` says where it comes from")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): fetch it again") from error


def read_once(read: Callable[..., Found]) -> Callable[..., Found]:
    """Let a reader of a file give again what it gave last, as long as the file is the same: not to be changed.

    A run needs some files twice, for its questions and for their truth.

    Args:
        read: is called with the file's path, and whatever else it needs.
    """
    last: list[tuple[Any, Found]] = []

    @functools.wraps(read)
    def read_or_remember(path: Path, *args: Any, **kwargs: Any) -> Found:
        if not path.is_file():  # it says so itself
            return read(path, *args, **kwargs)
        stat = path.stat()
        known = (path.resolve(), stat.st_mtime_ns, stat.st_size, args, tuple(kwargs.items()))
        if not last or last[0][0] != known:
            last[:] = [(known, read(path, *args, **kwargs))]
        return last[0][1]

    return read_or_remember


def need(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A field that must be there.

    Raises:
        ValueError: it is not; ``where`` says in what.
    """
    try:
        return row[name]
    except KeyError:
        raise ValueError(f"{where} has no {name!r}; it has {', '.join(map(str, row)) or 'nothing'}") from None


def refuse_repeated(ids: Iterable[Hashable], where: str) -> None:
    """Check that no id comes twice.

    Raises:
        ValueError: one does.
    """
    if repeated := [str(name) for name, count in Counter(ids).items() if count > 1]:
        raise ValueError(
            f"{where} has {len(repeated)} ids more than once ({', '.join(repeated[:3])}): fetch or make it again"
        )


def picture(path: Path) -> Visual:
    """An image file."""
    return Visual(str(path), partial(_open_file, path), path=path)


def picture_of(cell: Any, key: str) -> Visual:
    """The image in a cell of a table: ``{"bytes": …, "path": …}`` as parquet has it, or bytes.

    Args:
        cell: the image.
        key: names it, for messages and for questions that share it.
    """
    return Visual(key, partial(_open_cell, cell, key), content=partial(_checksum_of_cell, cell))


def _open_file(path: Path) -> list[Image.Image]:
    return [load_image(path, as_stored=True)]


def _checksum_of_cell(cell: Any) -> str:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return checksum_of_bytes(content if isinstance(content, bytes) else b"")


def _open_cell(cell: Any, key: str) -> list[Image.Image]:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise ValueError(f"{key} has no image bytes: fetch the data again")
    return [load_image(content, as_stored=True, name=key)]

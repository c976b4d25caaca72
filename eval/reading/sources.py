"""Reading benchmarks' data: files of LLaVA's layout, rows from the hub or of parquet files, images and video frames."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from llava.files import full_disk, writing
from llava.fingerprint import checksum
from llava.images import load_image

from .. import COMMAND
from ..records import Table, Visual
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


class Rows:
    """Rows of a table, in order; images in them stay encoded, ``{"bytes": …, "path": …}``.

    Args:
        dataset: of the package ``datasets``.
        name: for messages.
        files: that the rows are from.
    """

    def __init__(self, dataset: Any, name: str, files: Sequence[Path] = ()) -> None:
        self._dataset = dataset
        self.name = name
        self._files = files

    @cached_property
    def content(self) -> str:
        """A checksum of the files, which are sampled: of images in a table there is no cheaper one."""
        return checksum_of_bytes(" ".join(map(checksum, self._files)).encode())

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._dataset)

    def column(self, name: str) -> list[Any]:
        """All values of a column.

        Raises:
            ValueError: there is no such column.
        """
        if name not in self._dataset.column_names:
            raise ValueError(f"{self.name} has no column {name!r}; it has {', '.join(self._dataset.column_names)}")
        return list(self._dataset[name])

    def without(self, *columns: str) -> Rows:
        """The same rows without some columns: reading them then does not read the images."""
        return Rows(
            self._dataset.remove_columns([c for c in columns if c in self._dataset.column_names]),
            self.name,
            self._files,
        )

    def picture(self, index: int, column: str = "image") -> Visual:
        """The image in a row (of a list, the first), read from the table when it is opened."""
        key = f"{self.name} row {index} {column}"

        def open_() -> list[Image.Image]:
            cell = self.cell(index, column)
            return _open_cell(cell[0] if isinstance(cell, list) and cell else cell, key)

        return Visual(key, open_, content=lambda: self.content)

    def cell(self, index: int, column: str) -> Any:
        """A value as the file has it: images and videos encoded, also those in a list."""
        return self._dataset.with_format("arrow")[index][column].to_pylist()[0]

    def path(self, index: int, column: str) -> str | None:
        """Where the file lies that a cell names; None where its bytes are in the table. Bytes are not read for it."""
        cell = self._dataset.with_format("arrow")[index][column][0]
        if "bytes" in getattr(cell, "keys", tuple)():
            return None if cell["bytes"].is_valid else cell["path"].as_py()
        return cell.as_py() if str(cell.type) in ("string", "large_string") else None

    def __contains__(self, column: str) -> bool:
        return column in self._dataset.column_names


class Tables:
    """A benchmark's tables: from the hub, or from a local copy of its repository (a folder with parquet files).

    Args:
        tables: by name.
        source: a local folder for all of them; None is the hub.

    Attributes:
        folder: that folder.
    """

    def __init__(self, tables: Mapping[str, Table], source: Path | None = None) -> None:
        self._tables = tables
        self.folder = source
        self._rows: dict[str, Rows] = {}

    def __str__(self) -> str:
        names = {table.dataset: None for table in self._tables.values()}
        return ", ".join(names) if self.folder is None else str(self.folder)

    def __getitem__(self, name: str) -> Rows:
        """A table's rows; loaded once.

        Raises:
            FileNotFoundError: the folder has no such table.
            ValueError: a file is damaged.
            OSError: the hub cannot be reached, or has no such data set.
        """
        if name not in self._rows:
            self._rows[name] = self._load(self._tables[name])
        return self._rows[name]

    def _load(self, table: Table) -> Rows:
        try:
            import datasets  # noqa: PLC0415 - slow to import, and an extra
            import pyarrow  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(f'tables need the package {error.name}: pip install "llava-visionzip[eval]"') from error

        name = f"{table.dataset}{f' {table.config}' if table.config else ''} {table.split}"
        damaged = (
            datasets.exceptions.DatasetGenerationError,
            datasets.exceptions.DatasetNotFoundError,
            pyarrow.ArrowInvalid,  # of a file whose end is missing
        )
        try:
            if self.folder is None:
                loaded = datasets.load_dataset(table.dataset, table.config, split=table.split)
                files = [Path(file["filename"]) for file in loaded.cache_files]
            else:
                files = parquet_files(self.folder, table)
                names = [str(file) for file in files]
                loaded = datasets.load_dataset("parquet", data_files={table.split: names}, split=table.split)
        except (*damaged, OSError) as error:
            if full := full_disk(error):  # tables are unpacked into a cache
                safe = "It is HF_DATASETS_CACHE that says where; what is there stays"
                with writing(f"{name} into {datasets.config.HF_DATASETS_CACHE}", safe):
                    raise full from error
            if not isinstance(error, damaged):
                raise
            reason = error.__cause__ or error
            raise ValueError(f"{name} cannot be read ({reason}): fetch it again") from error
        for column, feature in loaded.features.items():
            if isinstance(feature, datasets.Image):
                loaded = loaded.cast_column(column, datasets.Image(decode=False))
        return Rows(loaded, name, files)


def parquet_files(folder: Path, table: Table) -> list[Path]:
    """The parquet files of a table in a copy of its repository: ``CONFIG/SPLIT-*.parquet`` or ``data/SPLIT-*.parquet``.

    Raises:
        FileNotFoundError: there are none, or some of several are missing (``-00000-of-00003``).
    """
    found = sorted(
        file
        for file in folder.rglob("*.parquet")
        if file.stem == table.split or file.name.startswith(f"{table.split}-")
    )
    if table.config is not None:
        found = [file for file in found if table.config in file.relative_to(folder).parts[:-1]]
    if not found:
        where = f"{table.config or 'data'}/{table.split}-*.parquet"
        raise FileNotFoundError(
            f"{folder} has no {where}: it must be a copy of the data set {table.dataset} "
            f"(`hf download --repo-type dataset {table.dataset} --local-dir {folder}`)"
        )
    wanted = {
        f"{match[1]}{part:0{len(match[2])}}-of-{match[2]}"
        for file in found
        if (match := re.fullmatch(r"(.*-)\d+-of-(\d+)", file.stem))
        for part in range(int(match[2]))
    }
    if missing := sorted(wanted - {file.stem for file in found}):
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(wanted)} files of {table.dataset} {table.split}, the first is "
            f"{missing[0]}.parquet: go on with `hf download --repo-type dataset {table.dataset} --local-dir {folder}`"
        )
    return found

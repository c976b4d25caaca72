"""Rows of benchmarks' tables: from the hub, from a copy of its repository, or of parquet files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from llava.storage.files import full_disk, writing
from llava.storage.fingerprint import checksum

from ..records import Table, Visual
from .fingerprint import checksum_of_bytes
from .sources import _open_cell


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

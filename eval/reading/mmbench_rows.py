"""MMBench's rows: those of LLaVA's TSV, and those of the hub's table, whose missing cells are the text ``nan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import COMMAND
from .sources import need, refuse_repeated

LETTERS = "ABCD"  # columns of options


def find_tsv(folder: Path, dev: str) -> Path:
    """The dev split's TSV, else the only one of a test split.

    Raises:
        FileNotFoundError: there is neither.
    """
    if (folder / dev).is_file():
        return folder / dev
    if len(tests := sorted(folder.glob("mmbench_test*.tsv"))) == 1:
        return tests[0]
    raise FileNotFoundError(
        f"there is no file {folder / dev}, nor one mmbench_test*.tsv: `{COMMAND} prepare` says where it comes from"
    )


def read_rows(path: Path, images: bool = True) -> list[dict[str, Any]]:
    """The cells of each row by column, empty ones as None; with or without the images.

    Raises:
        ValueError: the file is damaged.
    """
    import pandas as pd  # noqa: PLC0415 - of the extra `eval`

    # By pandas, as in LLaVA: what counts as quoted, and as empty (None and N/A, too), is what pandas says.
    columns = None if images else (lambda name: name != "image")
    try:
        frame = pd.read_table(path, dtype=str, usecols=columns)
    except ValueError as error:  # also pandas' own, and of a wrong encoding
        raise ValueError(f"{path} is no readable TSV ({error}): fetch it again") from error
    frame = frame.astype(object).where(frame.notna(), None)
    return checked_rows(frame.to_dict("records"), str(path))


def checked_rows(rows: Any, where: str) -> list[dict[str, Any]]:
    """Rows of either source with the columns' names in lower case, and what is missing in them as None.

    Raises:
        ValueError: a column is missing, an index is no number, or two rows have the same.
    """
    rows = [
        {name.lower() if name not in LETTERS else name: _cell(value) for name, value in row.items()} for row in rows
    ]
    for number, row in enumerate(rows):
        for name in ("index", "question", "hint", *LETTERS):
            need(row, name, f"row {number} of {where}")
        if not str(row["index"]).isdecimal():
            raise ValueError(f"row {number} of {where} has the index {row['index']!r}, not a number: fetch it again")
    refuse_repeated((int(row["index"]) for row in rows), where)
    return rows


def _cell(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in {"nan", "none"} else value

"""The files of a checkpoint: where it is, which of them have weights, and what is in those."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

# In the order in which transformers looks for them.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def checkpoint_path(path: str, flag: str | None = None) -> str:
    """A checkpoint's folder, or its name on the hub, with ``~`` expanded.

    Args:
        path: as the user gives it.
        flag: the flag that it is of, for the message.

    Raises:
        FileNotFoundError: it can only be a folder (see :func:`_is_folder_name`) and is not there; nothing asks the hub.
    """
    path = os.path.expanduser(path)  # noqa: PTH111 - pathlib would turn ./name into what could be a hub name
    if _is_folder_name(path) and not Path(path).is_dir():
        parent = Path(path).parent
        beside = [each.name for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []
        close = difflib.get_close_matches(Path(path).name, beside, n=1)
        guess = f": did you mean {parent / close[0]}?" if close else ""
        raise FileNotFoundError(
            f"{flag + ': ' if flag else ''}there is no folder {path}{guess} (a model on the hub has a name of the form "
            "owner/name)"
        )
    return path


def _is_folder_name(path: str) -> bool:
    """Whether a name is no model of the hub: it begins with . or /, with a folder that is here, or has several /."""
    first, slash, _ = path.partition("/")
    return path.startswith((".", "/")) or path.count("/") > 1 or (bool(slash) and Path(first).is_dir())


def find_file(path: str | Path, name: str) -> str | None:
    """Where a checkpoint (folder or hub name) has the file ``name``; None if it has none or cannot be reached."""
    if _is_folder_name(str(path)) and not Path(path).is_dir():
        return None  # the hub would be asked again and again
    try:
        return cached_file(str(path), name)
    except OSError:
        return None


def first_file(path: str, names: tuple[str, ...]) -> str | None:
    """The first of some files that a checkpoint has; None if it has none of them."""
    return next(filter(None, (find_file(path, name) for name in names)), None)


def has_weights(folder: str | Path) -> bool:
    """Whether a folder has a model's weights, complete or not (a projector's or an adapter's do not count)."""
    return any((Path(folder) / name).is_file() for name in _WEIGHT_FILES)


def weight_files(folder: str | Path) -> list[Path]:
    """The files that transformers loads from a local checkpoint: safetensors before .bin, one file before shards.

    Raises:
        FileNotFoundError: there are none, or not all that the index names; the message lists them.
        OSError: the index is damaged.
    """
    folder = Path(folder)
    first = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(
            f"{folder} has no weights: expected {', '.join(_WEIGHT_FILES[:-1])} or {_WEIGHT_FILES[-1]}. Download them "
            "again, or give the folder that has them"
        )
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise OSError(f"cannot read {first}: it is no index of weights; download it again. ({error!r})") from error
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} is incomplete: {len(absent)} of {len(names)} shards named in {first.name} are missing "
            f"({', '.join(absent)}): download them again"
        )
    return [folder / name for name in names]


def load_weights(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors of one ``.safetensors`` or ``.bin`` file.

    Args:
        path: the file.
        device: ``"cpu"``, or ``"meta"`` for names and shapes only, which reads next to nothing.

    Raises:
        OSError: the file is damaged.
    """
    try:
        return load_state_dict(path, map_location=device)
    except Exception as error:  # each reader, and each kind of damage, has its own
        raise OSError(
            f"cannot read the weights in {path} ({Path(path).stat().st_size} bytes): the file is damaged or was not "
            f"fully downloaded (git-lfs leaves a small text file): download it again. ({error})"
        ) from error


def weight_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a local checkpoint, read from the files' headers.

    Raises:
        FileNotFoundError: shards are missing.
        OSError: a file is damaged.
    """
    return {
        key: tuple(value.shape) for file in weight_files(folder) for key, value in load_weights(file, "meta").items()
    }

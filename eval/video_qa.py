"""Questions about videos, as Video-LLaVA asks them: TGIF-QA, MSVD-QA, MSRVTT-QA and ActivityNet-QA.

Prompt: one ``<image>`` for each of 8 frames (``--frames``), a line break, the question as it is; template ``llava_v1``,
or a model's own where that is not Vicuna's; greedy, up to 1024 tokens. (The released script asks for sampling at a
temperature of 0, which the transformers that it pins refuses.) Score: :mod:`eval.scoring.video_judge`. Source:
Video-LLaVA, ``videollava/eval/video/{run_inference,eval}_video_qa.py``, without three of its faults: on several GPUs it
compares predictions with the answers to other questions, mirrors videos at random, and passes over videos that are
missing (here they are counted as wrong; ``details`` has the accuracy without them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.video import FRAMES, read_frames

from .benchmark import Benchmark
from .reading.fingerprint import checksum_of_image
from .reading.frames import EXTENSIONS, clip, videos_below
from .reading.sources import need, read_json
from .reading.tables import Rows, Tables
from .records import File, Question, Table, Visual
from .scoring.video_judge import Item, graded, score

if TYPE_CHECKING:
    from PIL import Image

# Questions and answers


def read_items(folder: Path) -> list[Item]:
    """The questions in ``test_q.json`` and their answers in ``test_a.json``, in their order.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: one is damaged, they do not belong together, or two questions have one id.
    """
    questions, answers = (_records(folder / name) for name in ("test_q.json", "test_a.json"))
    where = f"{folder}: test_q.json and test_a.json"
    if len(questions) != len(answers):
        raise ValueError(f"{where} have {len(questions)} and {len(answers)} entries: fetch both again")
    items = []
    for place, (asked, answered) in enumerate(zip(questions, answers, strict=True)):
        ids = [need(row, "question_id", f"entry {place} of {where}") for row in (asked, answered)]
        if str(ids[0]) != str(ids[1]):  # the two are aligned by place too, and Video-LLaVA's script relies on that
            raise ValueError(f"{where} have other questions in entry {place}: {ids[0]!r} and {ids[1]!r}; fetch both")
        items.append(_item({**asked, **answered, "question_id": ids[0]}, "question_id", f"entry {place} of {where}"))
    return _unique(items, where)


def _records(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} is not a list of objects: fetch it again")
    return content


def _item(row: Mapping[str, Any], id_column: str, where: str) -> Item:
    name, video, question, answer = (need(row, key, where) for key in (id_column, "video_name", "question", "answer"))
    kind = row.get("type", row.get("question_type", "default"))
    return Item(name, str(video), str(question), str(answer), str(kind))


def _unique(items: Iterable[Item], where: str) -> list[Item]:
    """The items without exact repetitions: the official scorer counts one id once."""
    by_id: dict[str, Item] = {}
    for item in items:
        first = by_id.setdefault(str(item.id), item)
        if (item.video, item.question, item.answer) != (first.video, first.question, first.answer):
            raise ValueError(
                f"{where} have the question_id {item.id!r} twice: about {first.video}, {first.question!r} "
                f"({first.answer}), and about {item.video}, {item.question!r} ({item.answer}); scores go by id, so "
                "give each question its own"
            )
    return list(by_id.values())


def _by_id(items: Iterable[Item]) -> dict[str, Item]:
    return {str(item.id): item for item in items}


def _ask(item: Item, visual: Visual) -> Question:
    return Question(item.id, item.question, (visual,), item.kind)


# Tables


def _rows(tables: Tables, hub: str | None, title: str) -> Rows:
    if hub is None and tables.folder is None:
        raise ValueError(f"{title} is not on the hub: give a folder, Video-LLaVA's or one with parquet files")
    try:
        return tables["test"]
    except FileNotFoundError as error:
        if hub is not None:
            raise
        raise FileNotFoundError(
            f"{tables.folder} has no data/test-*.parquet with columns video_name, question, answer and question_id"
        ) from error


def _fetch_archives(dataset: str) -> Path:
    """The zip archives of a data set on the hub, fetched into its cache; returns their folder."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - where nothing is fetched it is not needed

    return Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=["*.zip"]))


def _items_in(rows: Rows, id_column: str) -> list[Item]:
    text = rows.without("video")
    items = (_item(row, id_column, f"row {index} of {rows.name}") for index, row in enumerate(text))
    return _unique(items, rows.name)


def _stored_videos(rows: Rows, folder: Path) -> dict[str, Visual] | None:
    """Videos in a table's column ``video``, by name; None where there is no such column."""
    if "video" not in rows:
        return None
    first: dict[str, int] = {}
    for index, name in enumerate(rows.column("video_name")):
        first.setdefault(str(name), index)
    keys = {name: f"{rows.name} video {name}" for name in first}
    return {
        name: Visual(
            keys[name],
            partial(_read_cell, rows, index, folder, keys[name]),
            FRAMES,
            content=partial(_content_of_cell, rows, index, folder),
        )
        for name, index in first.items()
    }


def _content_of_cell(rows: Rows, index: int, folder: Path) -> str:
    path = rows.path(index, "video")
    return rows.content if path is None else checksum_of_image(folder / path)


def _read_cell(rows: Rows, index: int, folder: Path, key: str, count: int = FRAMES) -> list[Image.Image]:
    cell = rows.cell(index, "video")
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(content, str):
        content, path = None, content
    if content is not None:
        return read_frames(content, key, count)
    if not path:
        raise ValueError(f"{key}: row {index} has neither its bytes nor its path")
    return read_frames(folder / path, str(folder / path), count)


def _find(videos: Mapping[str, Visual], item: Item, prefix: str, folder: Path) -> Visual:
    """A question's video among those of a folder; where it is not there, one that says so when it is opened."""
    found = videos.get(f"{prefix}{item.video}") or videos.get(item.video)
    return found or clip(folder / f"{prefix}{item.video}{EXTENSIONS[0]}")


# Benchmarks


def video_qa(
    *,
    name: str,
    title: str,
    size: str,
    folder: str,
    videos: str,
    source: str,
    hub: str | None = None,
    prefix: str = "",
    id_column: str = "question_id",
    kinds: Mapping[str, str] | None = None,
) -> Benchmark:
    """A benchmark, with all that the four share.

    A table has the columns video_name, question, answer, question_id and type (or question_type). The videos lie below
    the table's folder under their names, unpacked or in zip archives, or are in a column ``video``: a path from there,
    bytes, or ``{"bytes", "path"}``.

    Args:
        name: how commands call it.
        title: how tables call it.
        size: how many questions there are, in words.
        folder: in ``GPT_Zero_Shot_QA``.
        videos: folder of the videos in it.
        source: where the folder comes from.
        hub: data set on the hub; None: there is none, only folders of parquet files.
        prefix: of a video's name in its file's name.
        id_column: what a table calls the question's id.
        kinds: names of the types of questions.
    """
    table = Table(hub or f"{title} (there is none on the hub)", "test")

    def from_folder(root: Path) -> list[Question]:
        below = videos_below(root / videos)
        return [_ask(item, _find(below, item, prefix, root / videos)) for item in read_items(root)]

    def from_tables(tables: Tables) -> list[Question]:
        rows = _rows(tables, hub, title)
        items, root = _items_in(rows, id_column), tables.folder or _fetch_archives(table.dataset)
        below = _stored_videos(rows, root) or videos_below(root)
        return [_ask(item, _find(below, item, prefix, root)) for item in items]

    return Benchmark(
        name=name,
        title=title,
        summary=f"short open answers about videos, judged by GPT-3.5 (accuracy; {size})",
        folder=f"GPT_Zero_Shot_QA/{folder}",
        files=(File("test_q.json", source), File("test_a.json", source), File(f"{videos}/", source, "run")),
        tables={"test": table},
        from_folder=from_folder,
        from_tables=from_tables,
        truth_from_folder=lambda root: _by_id(read_items(root)),
        truth_from_tables=lambda tables: _by_id(_items_in(_rows(tables, hub, title), id_column)),
        score=partial(score, kinds=kinds),
        max_new_tokens=1024,
        conv_mode="llava_v1",
        judged=True,
        graded=graded,
    )

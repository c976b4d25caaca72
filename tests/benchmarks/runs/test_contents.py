"""What tells whether answers can stay: the contents of images, tables, archives and videos, not their names."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_end_to_end import NAMES, data_module

from eval.reading.fingerprint import checksum_of_image, contents_of
from eval.reading.sources import picture
from eval.reading.tables import Tables
from eval.records import Question, Visual
from eval.registry import BENCHMARKS
from eval.running.data import Data
from llava.storage.fingerprint import fingerprint


def data_of(name: str, root: Path, kind: str) -> Data:
    benchmark = BENCHMARKS[name]
    if kind == "tables":
        return Data(benchmark, root, Tables(benchmark.tables, root))
    return Data(benchmark, root / benchmark.folder)


def written(name: str, root: Path, kind: str) -> Path:
    module, more = data_module(name)
    getattr(module, f"write_{kind}")(root, *more)
    return root


def replace_images(root: Path) -> None:
    """Other bytes under the same names: in files, in archives, in cells of parquet files and of MMBench's TSV."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            rows = [{key: other(value) for key, value in row.items()} for row in table.to_pylist()]
            pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content[:-1] + b"?")
        elif path.suffix == ".tsv":
            path.write_text(path.read_text().replace("iVBOR", "iVBOQ").replace("/9j/4", "/9j/5"))
        elif path.suffix not in (".json", ".jsonl", ".txt"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")


def other(cell: object) -> object:
    if isinstance(cell, list):
        return [other(one) for one in cell]
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return {**cell, "bytes": cell["bytes"][:-1] + b"?"}
    return cell


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "folder") for name in [*NAMES, "scenes"]),
        *((name, "tables") for name in NAMES if BENCHMARKS[name].tables),
    ],
)
def test_other_images_have_other_contents(name: str, kind: str, tmp_path: Path, scenes_data: Path):
    """In each benchmark, from both sources; a copy elsewhere, made later, has the same."""
    root = tmp_path / "data"
    if name == "scenes":
        shutil.copytree(scenes_data, root / "scenes")
    else:
        written(name, root, kind)
    before = contents_of(data_of(name, root, kind).questions())
    copied = Path(shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile))
    assert contents_of(data_of(name, copied, kind).questions()) == before
    replace_images(root)
    after = contents_of(data_of(name, root, kind).questions())
    asked_about = [bool(question.visuals) for question in data_of(name, root, kind).questions()]
    assert [old != new for old, new in zip(before, after, strict=True)] == asked_about
    assert any(asked_about)


def test_one_image_is_its_own_questions_alone(tmp_path: Path):
    """Some questions share it, some have it among others, and some it is not in."""
    for name in "abc":
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    a, b, c = (picture(tmp_path / f"{name}.png") for name in "abc")
    asked = [Question(0, "?", (a,)), Question(1, "?", (b,)), Question(2, "?", (c, a)), Question(3, "?")]
    before = contents_of(asked)
    assert before[0] == before[1]  # what decides is what is in them
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    assert [old != new for old, new in zip(before, contents_of(asked), strict=True)] == [True, False, True, False]
    (tmp_path / "b.png").unlink()
    assert contents_of(asked)[1] not in before


@pytest.mark.parametrize("size", [(64, 64), (1200, 900)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_another_picture_of_the_same_size(suffix: str, size: tuple[int, int], tmp_path: Path):
    """Compressed or not, and the same time of change."""
    path = tmp_path / f"image{suffix}"
    noise = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    other = noise.copy()
    other[size[0] // 3 : size[0] // 2] = 255
    seen = set()
    for pixels in (noise, other, np.full_like(noise, 255)):
        Image.fromarray(pixels).save(path)
        os.utime(path, (1, 1))
        seen.add(checksum_of_image(path))
    assert len(seen) == 3


@pytest.mark.parametrize("size", [9, 70 << 20])
def test_another_checkpoint_at_the_same_path_is_noticed(size: int, tmp_path: Path):
    """Of a large file samples are read: each tensor of 4 MiB has one in it."""
    weights = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)

    def written(name: str, changed: slice = slice(0)) -> str:
        own = weights.copy()
        own[changed] += 1
        (tmp_path / name).mkdir(exist_ok=True)
        own.tofile(tmp_path / name / "model.safetensors")
        return fingerprint(str(tmp_path / name))

    one = written("one")
    assert written("copy") == written("one") == one
    tensor = min(4 << 20, size // 3)
    for start in (0, size // 3, size // 2, size - tensor):
        assert written("one", slice(start, start + tensor)) != one


def test_many_large_files_take_no_time(tmp_path: Path):
    """Samples are read: 200 files of 64 MB, which are 13 GB, in a moment."""
    for number in range(200):
        with (tmp_path / f"{number}.mp4").open("wb") as file:
            file.truncate(64_000_000)
    questions = [Question(n, "?", (Visual(str(n), list, 8, tmp_path / f"{n}.mp4"),)) for n in range(200)]
    start = time.perf_counter()
    assert len(set(contents_of(questions))) == 1
    assert time.perf_counter() - start < 5

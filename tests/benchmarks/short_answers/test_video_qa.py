"""Questions about videos: data both ways, and the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_video import DATA, write_folder, write_tables

from eval.benchmarks import activitynet, msrvtt, msvd, tgif
from eval.models.llava import prompt_of
from eval.reading.frames import with_frames
from eval.reading.tables import Tables
from eval.video_qa import Item, read_items

BENCHMARKS = {each.BENCHMARK.name: each.BENCHMARK for each in (tgif, msvd, msrvtt, activitynet)}
NAMES = list(BENCHMARKS)


def tables_of(root: Path, name: str) -> Tables:
    write_tables(root, name)
    return Tables(BENCHMARKS[name].tables, root)


# Data


@pytest.mark.parametrize("name", NAMES)
def test_questions_of_a_folder(tmp_path: Path, name: str):
    questions = BENCHMARKS[name].from_folder(write_folder(tmp_path, name))
    rows = DATA[name].rows
    assert [question.id for question in questions] == [row[0] for row in rows]
    assert [question.text for question in questions] == [row[2] for row in rows]
    assert [question.category for question in questions] == [str(row[4]) for row in rows]
    for question, row in zip(questions, rows, strict=True):
        (video,) = question.visuals
        file, _, frames = DATA[name].files[row[1]]
        assert video.path == tmp_path / BENCHMARKS[name].folder / DATA[name].videos / file
        assert video.frames == 8
        shown = [round((np.asarray(image).mean() - 10) / 20) for image in video.open()]
        assert shown == np.linspace(0, frames - 1, 8, dtype=int).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_tables_ask_the_same(tmp_path: Path, name: str):
    benchmark = BENCHMARKS[name]
    folder, tables = write_folder(tmp_path / "folder", name), tables_of(tmp_path / "tables", name)
    ours, theirs = benchmark.from_folder(folder), benchmark.from_tables(tables)
    for one, other in zip(ours, theirs, strict=True):
        assert replace(one, visuals=()) == replace(other, visuals=())
    for one, other in zip(ours, theirs, strict=True):
        images = zip(one.visuals[0].open(), other.visuals[0].open(), strict=True)
        assert all(first.tobytes() == second.tobytes() for first, second in images)
    assert benchmark.truth_from_tables(tables) == benchmark.truth_from_folder(folder)


@pytest.mark.parametrize("way", ["from_folder", "from_tables"])
@pytest.mark.parametrize("name", NAMES)
def test_questions_about_one_video_share_it(tmp_path: Path, name: str, way: str):
    source = (write_folder if way == "from_folder" else tables_of)(tmp_path, name)
    questions = getattr(BENCHMARKS[name], way)(source)
    videos = [row[1] for row in DATA[name].rows]
    keys = [question.visuals[0].key for question in questions]
    assert len(set(keys)) == len(set(videos)) == 3
    assert len(set(zip(keys, videos, strict=True))) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_video_is_said_when_it_is_its_turn(tmp_path: Path, name: str):
    """Before any work starts it is known by its path."""
    folder = write_folder(tmp_path, name)
    last = DATA[name].rows[3][1]
    (folder / DATA[name].videos / DATA[name].files[last][0]).unlink()
    *others, visual = (question.visuals[0] for question in BENCHMARKS[name].from_folder(folder))
    assert all(other.path is not None and other.path.is_file() for other in others)
    prefix = "v_" if name == "activitynet" else ""
    assert visual.path == folder / DATA[name].videos / f"{prefix}{last}.mp4"
    with pytest.raises(FileNotFoundError, match=f"there is no video {visual.path}"):
        visual.open()


def test_a_video_that_a_table_lacks(tmp_path: Path):
    write_tables(tmp_path / "msvd", "msvd")
    path = tmp_path / "msvd" / "data" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    cells = pa.array([None] * len(table), table.schema.field("video").type)
    pq.write_table(table.set_column(table.schema.get_field_index("video"), "video", cells), path)
    questions = msvd.BENCHMARK.from_tables(Tables(msvd.BENCHMARK.tables, tmp_path / "msvd"))
    with pytest.raises(ValueError, match=r"video bSrpvMSuhPM_17_31: row 2 has neither its bytes nor its path"):
        questions[2].visuals[0].open()
    tables = tables_of(tmp_path / "msrvtt", "msrvtt")
    (tmp_path / "msrvtt" / "videos" / "video6514.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no video .*/msrvtt/videos/video6514\.mp4"):
        msrvtt.BENCHMARK.from_tables(tables)[2].visuals[0].open()


def test_scoring_needs_only_the_annotations(tmp_path: Path):
    (tmp_path / "test_q.json").write_text('[{"video_name": "v", "question": "who?", "question_id": 7}]')
    (tmp_path / "test_a.json").write_text('[{"answer": "man", "type": 2, "question_id": 7}]')
    assert msvd.BENCHMARK.truth_from_folder(tmp_path) == {"7": Item(7, "v", "who?", "man", "2")}
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*videos"):
        msvd.BENCHMARK.from_folder(tmp_path)


def test_a_folder_that_lacks_annotations(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*test_q\.json"):
        read_items(tmp_path)


def asked(*rows: tuple[Any, str, str]) -> list[dict[str, Any]]:
    return [{"question_id": name, "video_name": video, "question": question} for name, video, question in rows]


def answered(*rows: tuple[Any, str]) -> list[dict[str, Any]]:
    return [{"question_id": name, "answer": answer, "type": 0} for name, answer in rows]


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        (asked((1, "a", "who?"), (2, "a", "what?")), answered((2, "cat"), (1, "man")), "in entry 0: 1 and 2"),
        (asked((1, "a", "who?")), answered((1, "man"), (2, "cat")), "have 1 and 2 entries"),
        (asked((1, "a", "who?"), (1, "a", "what?")), answered((1, "man"), (1, "cat")), "question_id 1 twice"),
        (asked((1, "a", "who?"), ("1", "a", "who?")), answered((1, "man"), ("1", "boy")), "question_id '1' twice"),
        (asked((1, "a", "who?"), (1, "b", "who?")), answered((1, "man"), (1, "man")), "question_id 1 twice"),
        (asked((1, "a", "who?")), [{"question_id": 1}], "entry 0 of .* has no 'answer'"),
        (asked((1, "a", "who?")), [{"answer": "man"}], "entry 0 of .* has no 'question_id'"),
        (asked((1, "a", "who?")), {"1": "man"}, r"test_a\.json is not a list of objects"),
    ],
)
def test_annotations_that_do_not_belong_together(tmp_path: Path, questions: Any, answers: Any, message: str):
    (tmp_path / "test_q.json").write_text(json.dumps(questions))
    (tmp_path / "test_a.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path)


def test_a_repeated_question_counts_once(tmp_path: Path):
    rows = (1, "a", "who?"), (2, "a", "what?"), (1, "a", "who?")
    (tmp_path / "test_q.json").write_text(json.dumps(asked(*rows)))
    (tmp_path / "test_a.json").write_text(json.dumps(answered((1, "man"), (2, "cat"), (1, "man"))))
    assert [item.id for item in read_items(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", ["tgif", "msvd", "msrvtt"])
def test_what_is_not_on_the_hub(tmp_path: Path, name: str):
    benchmark = BENCHMARKS[name]
    with pytest.raises(ValueError, match=f"{benchmark.title} is not on the hub: give a folder"):
        benchmark.from_tables(Tables(benchmark.tables))
    with pytest.raises(FileNotFoundError, match=r"no data/test-\*\.parquet with columns video_name, question"):
        benchmark.truth_from_tables(Tables(benchmark.tables, tmp_path))


def test_archives_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only for the questions, not for the truth; they need not be unpacked."""
    benchmark, fetched = activitynet.BENCHMARK, []
    local = tables_of(tmp_path, "activitynet")["test"]
    monkeypatch.setattr(Tables, "_load", lambda self, table: local)

    def fetch(dataset: str, **options: Any) -> str:
        fetched.append((dataset, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    tables = Tables(benchmark.tables)
    assert len(benchmark.truth_from_tables(tables)) == 4
    assert not fetched
    questions = benchmark.from_tables(tables)
    assert fetched == [("lmms-lab/ActivityNetQA", {"repo_type": "dataset", "allow_patterns": ["*.zip"]})]
    assert questions[0].visuals[0].key == f"{tmp_path}/videos_chunked_01.zip/all_test/v_1QIUV7WYKXg.mp4"
    assert len(questions[0].visuals[0].open()) == 8


def test_a_table_of_the_library_datasets(tmp_path: Path):
    """It marks the column as video, and would decode it by itself."""
    write_tables(tmp_path, "msvd")
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    features = {
        name: {"_type": "Video"} if name == "video" else {"dtype": str(table.schema.field(name).type), "_type": "Value"}
        for name in table.column_names
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    questions = msvd.BENCHMARK.from_tables(Tables(msvd.BENCHMARK.tables, tmp_path))
    assert len(questions[2].visuals[0].open()) == 8
    pq.write_table(pa.table({"question_id": [1], "question": ["who?"], "answer": ["man"]}), path)
    with pytest.raises(ValueError, match=r"row 0 of .*MSVD-QA.* has no 'video_name'"):
        msvd.BENCHMARK.truth_from_tables(Tables(msvd.BENCHMARK.tables, tmp_path))


def test_the_prompt(tmp_path: Path):
    """benchmarks.md 5.2: the frames, a line break and the question as it is; no short-answer instruction."""
    question = msvd.BENCHMARK.from_folder(write_folder(tmp_path, "msvd"))[0]
    assert prompt_of(question, SimpleNamespace(), "llava_v1") == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: "
        "<image><image><image><image><image><image><image><image>\nwho pours sauce into a bag? ASSISTANT:"
    )


@pytest.mark.parametrize("way", ["from_folder", "from_tables"])
@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_frames(tmp_path: Path, name: str, way: str):
    """``--frames``, wherever the videos are: files, archives or cells of a table."""
    source = (write_folder if way == "from_folder" else tables_of)(tmp_path, name)
    for question, row in zip(with_frames(getattr(BENCHMARKS[name], way)(source), 3), DATA[name].rows, strict=True):
        assert "USER: <image><image><image>\n" in prompt_of(question, SimpleNamespace(), "llava_v1")
        shown = [round((np.asarray(image).mean() - 10) / 20) for image in question.visuals[0].open()]
        assert shown == np.linspace(0, DATA[name].files[row[1]][2] - 1, 3, dtype=int).tolist()


def test_protocol():
    """benchmarks.md 5.1 and 5.2."""
    folders = {
        "tgif": ("TGIF_Zero_Shot_QA", "mp4/"),
        "msvd": ("MSVD_Zero_Shot_QA", "videos/"),
        "msrvtt": ("MSRVTT_Zero_Shot_QA", "videos/all/"),
        "activitynet": ("Activitynet_Zero_Shot_QA", "all_test/"),
    }
    for name, benchmark in BENCHMARKS.items():
        folder, videos = folders[name]
        assert benchmark.folder == f"GPT_Zero_Shot_QA/{folder}"
        assert [file.path for file in benchmark.files] == ["test_q.json", "test_a.json", videos]
        assert [file.needed for file in benchmark.files] == ["both", "both", "run"]
        assert (benchmark.conv_mode, benchmark.max_new_tokens, benchmark.judged) == ("llava_v1", 1024, True)

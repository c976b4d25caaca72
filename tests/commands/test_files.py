"""Writing on a disk that is full: what is there stays whole, and the message has the file and how to go on."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub.constants import HF_HOME
from judge_server import JudgeServer
from matplotlib.figure import Figure
from safetensors.torch import save_file

from checkpoints import picture
from eval.__main__ import main as eval_command
from eval.reading.tables import Tables
from eval.records import Answer, Table
from eval.running.answer_files import answers_file, read_answers
from eval.scoring.judge import api_judge
from eval.scoring.replies import Request
from llava.cli import main as visionzip_command
from llava.commands.parsers import run_command
from llava.measure.report import write_results
from llava.storage.files import WriteError, append, write_atomically
from llava.storage.folders import whole_files
from playground.scenes import write_training_data

WEIGHTS = {"weight": torch.arange(3000.0)}
WRITERS: dict[str, Any] = {
    "text": "tëxt" * 1000,
    "bytes": b"bytes" * 1000,
    "torch": partial(torch.save, WEIGHTS),
    "safetensors": partial(save_file, WEIGHTS),
    "figure": partial(Figure().savefig, format="png"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_whole_or_as_it_was(writer: str, full_disk, tmp_path: Path):
    path, content = tmp_path / "folder/file", WRITERS[writer]
    for before in (None, b"before"):
        with full_disk(500), pytest.raises(WriteError) as caught:
            write_atomically(path, content, "Nothing is lost")
        assert str(caught.value).startswith(f"cannot write {path}: ")
        assert str(caught.value).endswith(". Nothing is lost. Make room, or choose another disk.")
        assert "\n" not in str(caught.value)
        assert [file.read_bytes() for file in path.parent.iterdir()] == ([] if before is None else [before])
        path.write_bytes(b"before")
    write_atomically(path, content)
    assert path.stat().st_size > 500 and list(path.parent.iterdir()) == [path]
    with pytest.raises(WriteError, match=rf"cannot write {path}/below: .*\({path}\)\. It is as it was before, or not"):
        write_atomically(path / "below", content)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)
    assert not list(tmp_path.iterdir())


def test_processes_that_write_the_same_file(tmp_path: Path):
    """One that is still at it does not find its own file gone."""

    def slow(path: Path) -> None:
        path.write_text("slow")
        quick = multiprocessing.get_context("fork").Process(
            target=write_atomically, args=(tmp_path / "file", "quick"), kwargs={"shared": True}
        )
        quick.start()
        quick.join(timeout=60)
        assert (tmp_path / "file").read_text() == "quick" and path.read_text() == "slow"

    write_atomically(tmp_path / "file", slow, shared=True)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["slow"]


def test_lines_are_appended_whole(full_disk, tmp_path: Path):
    with (tmp_path / "lines").open("ab+", buffering=0) as file:
        append(file, b"first\n", "")
        with full_disk(9), pytest.raises(WriteError, match=r"lines: File too large\. The first stays\. Make room"):
            append(file, b"second\n", "The first stays")
        append(file, b"third\n", "")
    assert (tmp_path / "lines").read_bytes() == b"first\nthird\n"
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(WriteError, match="full: No space left on"):
        append(file, b"line", "")


def test_files_of_a_folder_stay_as_they_were(full_disk, tmp_path: Path):
    (tmp_path / "first").write_text("before")
    stays = pytest.raises(WriteError, match=f"cannot write {tmp_path}: .*What was there is as it was")
    with full_disk(500), stays, whole_files(tmp_path) as folder:
        (folder / "first").write_text("new")
        torch.save(WEIGHTS, folder / "second")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
    with whole_files(tmp_path) as folder:
        (folder / "first").write_text("new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


# Commands


@pytest.fixture
def run(make_checkpoint: Callable[..., Path], scenes_data: Path, tmp_path: Path) -> list[str]:
    places = ["--model-path", str(make_checkpoint()), "--data", str(scenes_data), "--output", str(tmp_path / "out")]
    return ["run", "scenes", *places, "--device", "cpu", "--method", "vanilla", "--limit", "6", "--batch-size", "2"]


def test_a_benchmark_goes_on_where_the_disk_was_full(run: list[str], full_disk, tmp_path: Path, capsys):
    """At an answer of a part, at the merged answers, at the results: each file is named, no answer is lost."""
    out = tmp_path / "out"
    assert eval_command(run) == 0
    part, merged = out / "answers/parts/vanilla.0.jsonl", out / "answers/vanilla.jsonl"
    answers, lines = merged.read_bytes(), part.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:3])  # the header and the first batch
    part.write_bytes(kept)
    for size, named in (
        (len(kept) + 20, part),
        (len(b"".join(lines[:5])) + 40, part),  # another batch has room
        (len(answers) - 20, merged),
        (len(b"".join(lines)) + 20, out / "results.json"),
    ):
        merged.unlink(missing_ok=True)
        if named == merged:
            part.write_bytes(b"".join(lines))
        with full_disk(size):
            assert eval_command(run) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"cannot write {named}: File too large. The answers that there are stay: the same command goes" in last
        assert part.read_bytes().endswith(b"\n") and len(part.read_bytes()) >= len(kept)
        assert not list(out.rglob("*.partial"))
    assert eval_command(run) == 0
    assert merged.read_bytes() == answers
    with full_disk(50):
        assert eval_command(["table", str(out)]) == 2
    assert f"cannot write {out}/table.md: File too large" in capsys.readouterr().err


def test_commands_name_what_they_cannot_write(make_checkpoint, scenes_data: Path, full_disk, tmp_path: Path, capsys):
    picture(0).save(tmp_path / "cube.png")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(answers_file([Answer(0, "yes")], "model", "run"))
    assert read_answers(answers)[0]
    score = ["score", "scenes", "--answers", str(answers), "--data", str(scenes_data), "--output"]
    shown = ["visualize", "--model-path", str(make_checkpoint()), "--image", str(tmp_path / "cube.png")]
    for command, words, file in (
        (eval_command, [*score, str(tmp_path / "score.json")], "score.json"),
        (visionzip_command, [*shown, "--out", str(tmp_path / "shown")], "shown/tokens.png"),
    ):
        with full_disk(50):
            assert command(words) == 2
        assert f"cannot write {tmp_path}/{file}: File too large" in capsys.readouterr().err
        assert not (tmp_path / file).exists()
    with full_disk(50), pytest.raises(WriteError, match=f"cannot write {tmp_path}/tower.json: File too large"):
        write_results(str(tmp_path / "tower.json"), {"seconds": [0.1] * 50})
    with full_disk(50), pytest.raises(WriteError, match=f"cannot write {tmp_path}/scenes/images: File too large"):
        write_training_data(tmp_path / "scenes", 2)


def test_tables_are_unpacked_where_there_is_no_room(full_disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the library, whose own words are that there was an error."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"answer": ["a" * 500 + str(row) for row in range(50)]})
    rows.to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    tables = Tables({"test": Table("owner/name", "test")}, tmp_path / "data")
    with full_disk(5000), pytest.raises(WriteError, match=rf"cannot write owner/name test into {tmp_path}/cache: File"):
        tables["test"]
    assert len(tables["test"]) == 50


def test_replies_of_a_judge(full_disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    requests = [Request(({"role": "user", "content": word},)) for word in ("one", "two" * 200)]
    with JudgeServer(lambda body, number: "yes") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        judge = api_judge("gpt", tmp_path, workers=1)
        with full_disk(400), pytest.raises(WriteError, match=r"\.json: File too large\. The replies that came before"):
            judge.ask(requests, str)
        assert [json.loads(file.read_text())["reply"] for file in tmp_path.iterdir()] == ["yes"]
        assert judge.ask(requests, str) == ["yes", "yes"] and len(server.asked) == 3


def test_what_libraries_write_where_there_is_no_room(capsys):
    """At least the folders that it can be in are named."""

    def fetch(args: None) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"weights")

    assert run_command("visionzip chat", fetch, None) == 2
    message = capsys.readouterr().err
    assert "visionzip chat: [Errno 28] No space left on device (in the output, in " in message and HF_HOME in message

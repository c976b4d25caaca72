"""``python -m eval run`` into a folder that has answers: it goes on, and mixes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_results import results_of

from checkpoints import edit_weights
from eval.__main__ import main as eval_command
from playground.scenes import make_test_set, write_parquet

ROOT = Path(__file__).resolve().parents[2]


def test_a_finished_run_is_not_done_again(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = run("--method", "vanilla", "uniform", "--tokens", "4", limit=8)
    assert eval_command(command) == 0
    before = results_of(tmp_path / "out")
    monkeypatch.setattr(
        "eval.models.llava.load_from_arguments", lambda *args, **kwargs: pytest.fail("the model is loaded")
    )
    assert eval_command(command) == 0
    after = results_of(tmp_path / "out")
    assert after["rows"] == before["rows"] and after["cost"] == before["cost"]


@pytest.mark.parametrize("lost", ["a torn line", "a whole answer", "all but a torn header"])
def test_a_killed_run_goes_on(run, tmp_path: Path, lost: str):
    """Every question is answered once, in the order and with the words of a run that was not killed."""
    command = run("--method", "vanilla", "random", "--tokens", "4", "--seeds", "1")
    assert eval_command(command) == 0
    file = tmp_path / "out" / "answers" / "parts" / "random-4-seed0.0.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {
        "a torn line": b"".join(lines[:6]) + lines[6][:9],
        "a whole answer": b"".join(lines[:-1]),
        "all but a torn header": lines[0][:20],
    }[lost]
    file.write_bytes(kept)
    merged = tmp_path / "out" / "answers" / "random-4-seed0.jsonl"
    before = merged.read_bytes()
    assert eval_command(command) == 0
    assert merged.read_bytes() == before
    resumed, whole = (untimed(content) for content in (file.read_bytes(), whole))
    if lost == "all but a torn header":  # written anew, with its date
        resumed, whole = resumed[1:], whole[1:]
    assert resumed == whole


def untimed(part: bytes) -> list[dict[str, Any]]:
    """A part's lines, without the seconds that answers took."""
    return [{**json.loads(line), "seconds": None} for line in part.splitlines()]


def test_kill(run, tmp_path: Path):
    """SIGKILL in the middle, then the same command."""
    arguments = run("--method", "vanilla", "pool", "--tokens", "4", limit=96)
    command, answers = [sys.executable, "-m", "eval", *arguments], tmp_path / "out" / "answers"
    file = answers / "parts" / "vanilla.0.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not file.exists() or file.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    assert eval_command(arguments) == 0
    ids = [json.loads(line)["question_id"] for line in (answers / "vanilla.jsonl").read_text().splitlines()]
    assert ids == list(range(96))
    assert len(results_of(tmp_path / "out")["rows"]) == 2


def test_answers_of_another_setting_are_not_mixed(run, copied, scenes_data: Path, tmp_path: Path, capsys):
    folder = copied()
    command = run("--method", "vanilla", model=folder, limit=8)
    assert eval_command(command) == 0
    answers = tmp_path / "out" / "answers" / "parts" / "vanilla.0.jsonl"
    before = answers.read_bytes()
    other_data = tmp_path / "other.parquet"  # the file itself will do, too
    write_parquet(list(make_test_set(seed=6, per_type=40)), other_data)
    for more, changed in (
        (["--conv-mode", "llava_v1"], r"first_prompt was .*curious user.*, is .*curious human"),
        (["--data", str(other_data)], "data was"),
    ):
        assert eval_command([*command, *more]) == 2
        assert_matches(capsys.readouterr().err, changed)
    edit_weights(folder, lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    assert eval_command(command) == 2
    assert_matches(
        capsys.readouterr().err, r"vanilla.0.jsonl has answers of another setting.*\(model was.*choose another"
    )
    assert answers.read_bytes() == before


def assert_matches(text: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_a_larger_limit_adds_to_the_answers(run, tmp_path: Path):
    assert eval_command(run("--method", "vanilla", limit=8)) == 0
    assert eval_command(run("--method", "vanilla", limit=20)) == 0
    answers = tmp_path / "out" / "answers" / "vanilla.jsonl"
    assert len(answers.read_text().splitlines()) == 20
    assert eval_command(run("--method", "vanilla", limit=8)) == 0
    results = results_of(tmp_path / "out")
    assert (results["questions"], results["limited"]) == (8, True)
    assert "Partial: 8 of 280 questions, scored over these;" in (tmp_path / "out" / "table.md").read_text()
    assert len(answers.read_text().splitlines()) == 8


def test_answers_of_other_code_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    command = run("--method", "vanilla", limit=4)
    monkeypatch.setattr("eval.running.runner.git_commit", lambda: "c0ffee")
    assert eval_command(command) == 0
    monkeypatch.setattr("eval.running.runner.git_commit", lambda: "decade")
    assert eval_command(command) == 0
    assert "has answers of other code (commit c0ffee), which stay" in capsys.readouterr().err


def test_a_damaged_line_in_the_middle_of_a_run(run, tmp_path: Path, capsys):
    """Its question is asked again, and that is said once."""
    command = run("--method", "vanilla")
    assert eval_command(command) == 0
    file, merged = (tmp_path / "out" / "answers" / name for name in ("parts/vanilla.0.jsonl", "vanilla.jsonl"))
    before, lines = merged.read_bytes(), file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:7], lines[7][:20] + b"\n", *lines[8:]]))
    assert eval_command(command) == 0
    said = capsys.readouterr().err
    assert f"vanilla: damaged and left out: line 8 of {file} (" in said and "the other 23 answers stay" in said
    assert merged.read_bytes() == before
    assert len(file.read_bytes().splitlines()) == 1 + 24 + 1
    assert eval_command(command) == 0
    assert "damaged" not in capsys.readouterr().err


def test_other_images_under_the_same_names(run, scenes_data: Path, tmp_path: Path, capsys):
    """Their questions are asked again, the answers are those of a fresh folder; the old ones are there for the old."""
    table = pq.read_table(scenes_data / "test.parquet").slice(0, 24).to_pylist()
    folder, answers = tmp_path / "data", tmp_path / "out" / "answers" / "vanilla.jsonl"
    folder.mkdir()
    replaced = {row["image_id"] for row in table[:6]}
    others = [
        {**row, "image": {**row["image"], "bytes": table[-1]["image"]["bytes"]}} if row["image_id"] in replaced else row
        for row in table
    ]
    affected = sum(row["image_id"] in replaced for row in table)
    command = run("--method", "random", "--tokens", "4", "--seeds", "1", "--data", str(folder))
    answers = tmp_path / "out" / "answers" / "random-4-seed0.jsonl"
    found = []
    for rows, again in ((table, 0), (others, affected), (table, 0)):
        pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
        assert eval_command(command) == 0
        said = capsys.readouterr().err
        assert (f": {again} of 24 questions are asked again, as their images" in said) == bool(again)
        found.append(answers.read_bytes())
        if again:
            assert eval_command([*command, "--output", str(tmp_path / "fresh")]) == 0
            assert (tmp_path / "fresh" / "answers" / answers.name).read_bytes() == found[-1]
            capsys.readouterr()
    assert found[0] == found[2] and 0 < affected < 24

"""``python -m eval``: scores, resumption, what it refuses, and the quickstart, on a tiny random model and test set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from checkpoints import CLIP, NEXT, edit_weights
from eval.__main__ import main as eval_command
from eval.answers import Answer, open_answers
from eval.methods import METHODS, Run, attach, attached, plan, split
from eval.registry import BENCHMARKS
from eval.results import bootstrap, summarize
from playground.scenes import make_test_set, write_parquet
from visionzip import visionzip

ROOT = Path(__file__).resolve().parents[1]
SCENES = BENCHMARKS["scenes"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test set of 280 questions."""
    path = tmp_path_factory.mktemp("scenes") / "test.parquet"
    write_parquet(list(make_test_set(seed=5, per_type=40)), path)
    return path


@pytest.fixture
def run(make_checkpoint: Callable[..., Path], data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short run on the tiny model (4 x 4 patches), into ``out``."""

    def arguments(*more: str, model: Path | None = None, limit: int = 24) -> list[str]:
        model = model or make_checkpoint()
        places = ["--model-path", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
        return ["run", "scenes", *places, "--device", "cpu", "--batch-size", "8", "--limit", str(limit), *more]

    return arguments


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_list(capsys):
    assert eval_command(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*BENCHMARKS, *METHODS))


def test_run_and_table(run, data: Path, tmp_path: Path, capsys):
    """Every method at two budgets: counted tokens, scores that the answers give, a table of them, and a quick rerun."""
    methods = list(METHODS)
    command = run("--method", *methods, "--tokens", "6", "4", "--seeds", "2")
    assert eval_command(command) == 0
    out = tmp_path / "out"
    results, printed = results_of(out), capsys.readouterr().out
    assert len(results["rows"]) == 1 + 2 * (len(methods) - 1)
    assert {row["visual_tokens"] for row in results["rows"]} == {16, 6, 4}
    assert all(row["tokens"] in (None, row["visual_tokens"]) for row in results["rows"])
    assert [row["method"] for row in results["rows"][:3]] == ["vanilla", "visionzip", "dominant-only"]
    assert results["questions"] == 24 and "USER: <image>\n" in results["setting"]["first_prompt"]

    samples = {sample.id: sample for sample in SCENES.load(data)[:24]}
    for row in results["rows"]:
        runs = plan([row["method"]], [row["tokens"]] if row["tokens"] else [], 2)
        found = []
        for name in (each.name for each in runs):
            lines = (out / "answers" / f"{name}.jsonl").read_text().splitlines()[1:]
            answers = [Answer(**json.loads(line)) for line in lines]
            assert sorted(answer.id for answer in answers) == sorted(samples)
            found += [SCENES.score(samples[answer.id], answer.text) for answer in answers]
        assert row["overall"]["mean"] == pytest.approx(np.mean(found))
    assert {entry["minus"] for entry in results["differences"]} == set(methods) - {"vanilla", "visionzip"}

    table = (out / "table.md").read_text()
    assert "| visionzip 5+1 | 6 |" in table and "| visionzip 3+1 | 4 |" in table and "| no-cls 3+1 | 4 |" in table
    assert "random: mean of 2 seeds" in table and "visionzip 5+1" in printed
    assert not list(out.rglob("*.partial"))

    (out / "table.md").unlink()
    assert eval_command(["table", str(out)]) == 0
    assert (out / "table.md").read_text() == table


def test_a_finished_run_is_not_done_again(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = run("--method", "vanilla", "uniform", "--tokens", "4", limit=8)
    assert eval_command(command) == 0
    before = results_of(tmp_path / "out")
    monkeypatch.setattr("eval.runner.load_from_arguments", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    assert eval_command(command) == 0
    after = results_of(tmp_path / "out")
    assert after["rows"] == before["rows"] and after["cost"] == before["cost"]


@pytest.mark.parametrize("lost", ["a torn line", "a whole answer", "all but a torn header"])
def test_a_killed_run_goes_on(run, tmp_path: Path, lost: str):
    """Every question is answered once, in the order and with the words of a run that was not killed."""
    command = run("--method", "vanilla", "random", "--tokens", "4", "--seeds", "1")
    assert eval_command(command) == 0
    file = tmp_path / "out" / "answers" / "random-4-seed0.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {
        "a torn line": b"".join(lines[:6]) + lines[6][:9],
        "a whole answer": b"".join(lines[:-1]),
        "all but a torn header": lines[0][:20],
    }[lost]
    file.write_bytes(kept)
    assert eval_command(command) == 0
    resumed = file.read_bytes()
    if lost == "all but a torn header":  # written anew, with its date
        resumed, whole = (content.split(b"\n", 1)[1] for content in (resumed, whole))
    assert resumed == whole


def test_kill(run, tmp_path: Path):
    """SIGKILL in the middle, then the same command."""
    arguments = run("--method", "vanilla", "pool", "--tokens", "4", limit=96)
    command, file = [sys.executable, "-m", "eval", *arguments], tmp_path / "out" / "answers" / "vanilla.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not file.exists() or file.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()[1:]]
    assert sorted(map(int, ids)) == list(range(96))
    assert len(results_of(tmp_path / "out")["rows"]) == 2


def test_answers_of_another_setting_are_not_mixed(run, copied, data: Path, tmp_path: Path, capsys):
    folder = copied()
    command = run("--method", "vanilla", model=folder, limit=8)
    assert eval_command(command) == 0
    answers = tmp_path / "out" / "answers" / "vanilla.jsonl"
    before = answers.read_bytes()
    other_data = tmp_path / "other.parquet"
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
        capsys.readouterr().err, r"vanilla.jsonl has answers of another setting.*\(model was.*choose another"
    )
    assert answers.read_bytes() == before


def assert_matches(text: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_a_larger_limit_adds_to_the_answers(run, tmp_path: Path):
    assert eval_command(run("--method", "vanilla", limit=8)) == 0
    assert eval_command(run("--method", "vanilla", limit=20)) == 0
    assert len((tmp_path / "out" / "answers" / "vanilla.jsonl").read_text().splitlines()) == 21
    assert eval_command(run("--method", "vanilla", limit=8)) == 0
    assert results_of(tmp_path / "out")["questions"] == 8


def test_batches_do_not_matter(run, tmp_path: Path):
    """Eight at a time give the answers of one at a time; questions about one image share its encoding."""
    texts = []
    for size in ("8", "1"):
        out = tmp_path / f"out{size}"
        command = run("--method", "random", "visionzip", "--tokens", "6", "--batch-size", size, "--output", str(out))
        assert eval_command(command) == 0
        names = ("random-6-seed0", "visionzip-6")
        texts.append([(out / "answers" / f"{name}.jsonl").read_text().splitlines()[1:] for name in names])
    assert texts[0] == texts[1]


def test_bad_input_is_explained_before_anything_is_loaded(run, unread, data: Path, tmp_path: Path, capsys):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(data.read_bytes()[:5000])
    twice = tmp_path / "twice.parquet"
    table = pq.read_table(data)
    pq.write_table(table.take([0, 1, 1]), twice)
    few = tmp_path / "few.parquet"
    pq.write_table(table.drop_columns(["answer"]), few)
    for more, message in (
        (["--method", "pool"], "--method pool needs a budget: give --tokens"),
        (["--method", "vanilla", "--data", "nowhere.parquet"], "no file nowhere.parquet: make it with"),
        (["--method", "vanilla", "--data", str(damaged)], "damaged.parquet is not a readable parquet file"),
        (["--method", "vanilla", "--data", str(twice)], "several questions with the question_id 1"),
        (["--method", "vanilla", "--data", str(few)], "few.parquet has no column answer"),
        (["--method", "vanilla", "--model-path", "/nowhere"], "/nowhere has no config.json"),
    ):
        assert eval_command([*run(), *more]) == 2, more
        assert message in capsys.readouterr().err
    assert eval_command(["table", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err


def test_grids_of_tiles(run, make_checkpoint, tmp_path: Path, capsys):
    """LLaVA-NeXT: budgets are per tile, what is counted is what the language model gets; controls are refused."""
    command = run("--method", "vanilla", "visionzip", "--tokens", "6", model=make_checkpoint(**NEXT), limit=4)
    assert eval_command(command) == 0
    vanilla, zipped = results_of(tmp_path / "out")["rows"]
    assert vanilla["visual_tokens"] > 5 * 16  # newlines too
    assert (zipped["dominant"], zipped["contextual"], zipped["visual_tokens"]) == (5, 1, 5 * 6)
    assert eval_command([*command, "--method", "uniform"]) == 2
    assert "cuts images into grids of tiles" in capsys.readouterr().err


def test_answers_of_other_code_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    command = run("--method", "vanilla", limit=4)
    monkeypatch.setattr("eval.runner.git_commit", lambda: "c0ffee")
    assert eval_command(command) == 0
    monkeypatch.setattr("eval.runner.git_commit", lambda: "decade")
    assert eval_command(command) == 0
    assert "has answers of other code (commit c0ffee), which stay" in capsys.readouterr().err


def test_budgets_are_checked_before_the_first_answer(run, tmp_path: Path, capsys):
    for tokens, message in (("17", "an image has only 16 patches"), ("7", "tokens=7 cannot be pooled")):
        assert eval_command(run("--method", "vanilla", "pool", "--tokens", tokens)) == 2
        assert message in capsys.readouterr().err
    assert len((tmp_path / "out" / "answers" / "vanilla.jsonl").read_text().splitlines()) == 1  # its header


def test_damaged_answers_are_not_overwritten(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    with open_answers(path, {"tokens": 4}, {}) as file:
        file.append([Answer("1", "yes", 4), Answer("2", "Übergröße", 4)])
        with pytest.raises(BlockingIOError, match="another process is writing"), open_answers(path, {"tokens": 4}, {}):
            pass
    with open_answers(path, {"tokens": 4}, {}) as file:
        assert file.answers["2"].text == "Übergröße"
    lines = path.read_bytes().splitlines(keepends=True)
    for content, message in (
        ([lines[0], b"{\n", lines[1]], "line 2 of .* is damaged"),
        ([*lines, lines[1]], "answers question 1 twice"),
    ):
        path.write_bytes(b"".join(content))
        with pytest.raises(ValueError, match=message), open_answers(path, {"tokens": 4}, {}):
            pass
        assert path.read_bytes() == b"".join(content)


def test_methods(load):
    _, model, _, _ = load(vision={**CLIP, "image_size": 112})  # 8 x 8 patches
    images = [torch.randn(3, 112, 112)]
    everything = model.visual_tokens(images)[0]
    for run in plan(list(METHODS), [32, 4], 2):
        with attached(model, run):
            assert len(model.visual_tokens(images)[0]) == (run.tokens or 64), run.name
        assert torch.equal(model.visual_tokens(images)[0], everything)
    with attached(model, Run("visionzip", 32)):
        expected = model.visual_tokens(images)[0]
    torch.testing.assert_close(visionzip(model, 27, 5).visual_tokens(images)[0], expected)
    attach(model, Run("no-cls", 32))  # in the place of what is on it
    no_cls = model.visual_tokens(images)[0]
    attach(model, Run("dominant-only", 28))
    torch.testing.assert_close(model.visual_tokens(images)[0][1:], no_cls[:27])


def test_budgets_and_names():
    paper = {64: (54, 10), 128: (108, 20), 192: (162, 30), 32: (27, 5)}
    assert {tokens: split(tokens) for tokens in paper} == paper
    assert [split(tokens) for tokens in (48, 16, 1)] == [(40, 8), (13, 3), (1, 0)]
    runs = plan(["random", "vanilla", "pool", "pool"], [9, 4, 9], 2)
    names = ["vanilla", "random-9-seed0", "random-9-seed1", "pool-9", "random-4-seed0", "random-4-seed1", "pool-4"]
    assert [run.name for run in runs] == names


@pytest.mark.parametrize(("text", "right"), [("red", 1), (" Red. ", 1), ("reddish", 0), ("", 0), ("red red", 0)])
def test_exact_match(data: Path, text: str, right: float):
    sample = next(sample for sample in SCENES.load(data) if sample.answer == "red")
    assert SCENES.score(sample, text) == right


def test_scores_by_hand(data: Path):
    """Of four questions vanilla has three, VisionZip two, random three with one seed and one with the other."""
    samples = [next(s for s in SCENES.load(data) if s.category == c) for c in ("count", "color", "shape", "reading")]
    right = {
        Run("vanilla"): [1, 1, 1, 0],
        Run("visionzip", 4): [0, 1, 1, 0],
        Run("random", 4, 0): [0, 1, 1, 1],
        Run("random", 4, 1): [0, 1, 0, 0],
    }
    answers = {
        run: {
            sample.id: Answer(sample.id, sample.answer if is_right else "?", run.tokens or 144)
            for sample, is_right in zip(samples, row, strict=True)
        }
        for run, row in right.items()
    }
    seconds = {"154": [0.3, 0.2, 0.4], "14": [0.1, 0.1, 0.1]}
    prefill = {length: {"seconds": times, "flops": 10, "paper_flops": 4} for length, times in seconds.items()}
    cost = {"text_tokens": 10, "prefill": prefill, "vision_seconds": {}}
    summary = summarize(SCENES, samples, answers, cost)
    vanilla, zipped, random = summary["rows"]
    assert [row["overall"]["mean"] for row in summary["rows"]] == [0.75, 0.5, 0.5]
    assert random["overall_by_seed"] == {"0": 0.75, "1": 0.25}
    assert zipped["of_vanilla"] == pytest.approx(2 / 3)
    assert zipped["accuracy"]["color"]["mean"] == 1 and random["accuracy"]["reading"]["mean"] == 0.5
    assert zipped["accuracy"]["presence"] is None
    assert zipped["prefill_seconds"]["median"] == 0.1 and zipped["prefill_speed_up"]["median"] == pytest.approx(3)
    assert (vanilla["visual_tokens"], zipped["visual_tokens"], zipped["prompt_tokens"]) == (144, 4, 14)
    # Of n scores the standard error of the mean is their standard deviation (with n below it) by the root of n.
    assert zipped["overall"]["standard_error"] == pytest.approx(np.std([0, 1, 1, 0]) / 2, rel=0.1)
    (difference,) = summary["differences"]
    assert (difference["minus"], difference["difference"]) == ("random", 0)
    assert difference["standard_error"] == pytest.approx(np.std([0, 0, 0.5, -0.5]) / 2, rel=0.1)


def test_bootstrap_is_seeded_and_paired():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 2, (400, 1)).astype(float)
    every = np.ones(400, dtype=bool)
    drawn = bootstrap(np.hstack([scores, 1 - scores]), [every])
    np.testing.assert_array_equal(bootstrap(np.hstack([scores, 1 - scores]), [every]), drawn)
    np.testing.assert_allclose(drawn.sum(axis=2), 1)
    assert drawn[:, 0, 0].std() == pytest.approx(scores.std() / 20, rel=0.1)


def test_quickstart(make_checkpoint, data: Path, tmp_path: Path):
    """The script, as users start it, on another model and few questions; pip is left out, the environment is there."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] || exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    model = make_checkpoint(vision={**CLIP, "image_size": 112})  # 8 x 8 patches
    out = tmp_path / "quickstart"
    places = {"VIRTUAL_ENV": str(tmp_path / "venv"), "MODEL_PATH": str(model), "OUTPUT": str(out)}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--limit", "4", "--seeds", "1", "--data", str(data)]
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "visionzip 40+8" in done.stdout and "pool" in done.stdout
    assert {row["visual_tokens"] for row in results_of(out)["rows"]} == {64, 48, 32, 16}
    assert {"table.md", "results.json", "tokens.png", "scene.jpg"} <= {file.name for file in out.iterdir()}

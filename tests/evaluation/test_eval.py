"""``python -m eval run``: tables, going on, what it refuses, the quickstart; on a tiny random model and test set."""

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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from checkpoints import CLIP, NEXT, edit_weights
from eval.__main__ import main as eval_command
from eval.benchmarks import scenes
from eval.models.llava import LlavaModel
from eval.registry import BENCHMARKS
from eval.running.answer_files import read_answers
from eval.running.methods import METHODS, Run, plan
from llava.images import AS_STORED
from playground.scenes import make_test_set, write_parquet

ROOT = Path(__file__).resolve().parents[2]
# An average over both layers is more than half of the tokens, and SparseVLM's is published for 32 layers.
IN_TWO_LAYERS = [name for name, own in METHODS.items() if not (name.endswith("-average") or own.of_picture)]


@pytest.fixture
def run(make_checkpoint: Callable[..., Path], scenes_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short run on the tiny model (4 x 4 patches), into ``out``."""

    def arguments(*more: str, model: Path | None = None, limit: int = 24) -> list[str]:
        model = model or make_checkpoint()
        places = ["--model-path", str(model), "--data", str(scenes_data), "--output", str(tmp_path / "out")]
        return ["run", "scenes", *places, "--device", "cpu", "--batch-size", "8", "--limit", str(limit), *more]

    return arguments


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_list(capsys):
    assert eval_command(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in BENCHMARKS)


@pytest.mark.parametrize("columns", [80, 140])
def test_methods_have_one_line_and_their_paper(columns: int, monkeypatch: pytest.MonkeyPatch, capsys):
    """A table where the terminal is wide enough for it, else a few lines for each method; nothing is cut off."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert eval_command(["methods"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, method in METHODS.items():
        assert name in printed and method.summary in printed and method.paper in printed
    assert "arXiv 2412.04467" in printed and "arXiv 2403.06764" in printed


def test_run_and_table(run, scenes_data: Path, tmp_path: Path, capsys):
    """Every method at two budgets: counted tokens, scores that the answers give, a table of them, and a quick rerun."""
    methods = IN_TWO_LAYERS
    command = run("--method", *methods, "--tokens", "6", "4", "--seeds", "2")
    assert eval_command(command) == 0
    out = tmp_path / "out"
    results, printed = results_of(out), capsys.readouterr().out
    assert len(results["rows"]) == 1 + 2 * (len(methods) - 1)
    assert {row["visual_tokens"] for row in results["rows"]} == {16, 6, 4}
    assert all(row["tokens"] in (None, row["visual_tokens"]) for row in results["rows"])
    assert [row["method"] for row in results["rows"][:3]] == ["vanilla", "visionzip", "dominant-only"]
    assert {row["method"]: row["seeds"] for row in results["rows"]} == {m: [0, 1] * (m == "random") for m in methods}
    assert (results["batch_size"], results["processes"], results["model_base"]) == (8, 1, None)
    assert results["questions"] == 24 and "USER: <image>\n" in results["setting"]["first_prompt"]

    truth = scenes.truth(scenes_data)
    for row in results["rows"]:
        runs = plan([row["method"]], [row["tokens"]] if row["tokens"] else [], 2)
        found = []
        for name in (each.name for each in runs):
            answers, notes = read_answers(out / "answers" / f"{name}.jsonl")
            assert [answer.question_id for answer in answers] == list(truth)[:24]
            assert notes == {"model": results["model"], "run": name}
            found += [scenes.is_right(answer.text, truth[answer.question_id][1]) for answer in answers]
        assert row["score"] == pytest.approx(100 * np.mean(found))
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert {entry["minus"] for entry in results["differences"]} == set(methods) - {"vanilla", "visionzip"}

    table = (out / "table.md").read_text()
    assert "| visionzip 5+1 | 6 |" in table and "| visionzip 3+1 | 4 |" in table and "| no-cls 3+1 | 4 |" in table
    assert "random: mean of 2 seeds" in table and "visionzip 5+1" in printed
    assert results["images"] == AS_STORED and AS_STORED in table
    assert not list(out.rglob("*.partial"))

    (out / "table.md").unlink()
    assert eval_command(["table", str(out)]) == 0
    assert (out / "table.md").read_text() == table


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


def test_batches_do_not_matter(run, tmp_path: Path):
    """Eight at a time give the answers of one at a time; questions about one image share its encoding."""
    texts = []
    for size in ("8", "1"):
        out = tmp_path / f"out{size}"
        command = run("--method", "random", "visionzip", "--tokens", "6", "--batch-size", size, "--output", str(out))
        assert eval_command(command) == 0
        names = ("random-6-seed0", "visionzip-6")
        texts.append([(out / "answers" / f"{name}.jsonl").read_text() for name in names])
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("quick_starts")
def test_two_processes_give_the_answers_of_one(run, tmp_path: Path):
    """Started by torchrun, which deals the batches out; each question is answered once, and the files are the same."""
    command = run("--method", "visionzip", "--tokens", "6", limit=40)
    assert eval_command(command) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eval"]
    shared = tmp_path / "shared"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *command, "--output", str(shared)], cwd=ROOT, env=environment, check=True, timeout=300)
    one, two = (folder / "answers" / "visionzip-6.jsonl" for folder in (tmp_path / "out", shared))
    assert two.read_bytes() == one.read_bytes()
    parts = [file.read_text().splitlines() for file in sorted((shared / "answers" / "parts").iterdir())]
    assert [len(part) - 1 for part in parts] == [24, 16]  # five batches of eight
    first, second = sorted((shared / "answers" / "parts").iterdir())  # killed, and gone on with by one process
    first.write_bytes(b"".join(first.read_bytes().splitlines(keepends=True)[:12]))
    second.write_bytes(second.read_bytes()[:-9])
    two.unlink()
    assert eval_command([*command, "--output", str(shared)]) == 0
    assert two.read_bytes() == one.read_bytes()
    assert results_of(shared)["rows"][0]["score"] == results_of(tmp_path / "out")["rows"][0]["score"]


def test_a_budget_of_ones_own(run, copied, tmp_path: Path, capsys):
    """``--dominant`` and ``--contextual``, and the budget that a checkpoint was saved with."""
    command = run("--method", "visionzip", "--dominant", "5", "--contextual", "3", limit=4)
    assert eval_command(command) == 0
    (row,) = results_of(tmp_path / "out")["rows"]
    assert (row["dominant"], row["contextual"], row["visual_tokens"]) == (5, 3, 8)
    assert (tmp_path / "out" / "answers" / "visionzip-8-5+3.jsonl").exists()
    for more, message in (
        (["--dominant", "5"], "give both"),
        (["--method", "vanilla", "--dominant", "5", "--contextual", "3"], "--method vanilla keeps all visual tokens"),
    ):
        assert eval_command(run(*more)) == 2
        assert message in capsys.readouterr().err
    folder = copied()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "visionzip": {"dominant": 3, "contextual": 2}}))
    out = tmp_path / "tuned"
    assert eval_command(run("--method", "visionzip", "--output", str(out), model=folder, limit=4)) == 0
    assert (results_of(out)["rows"][0]["visual_tokens"], results_of(out)["tuned"]) == (5, True)


def test_positions_and_size_bias(run, tmp_path: Path, capsys):
    """They are options of any method that chooses before the language model, and other answers: in name and setting."""
    flags = ["--method", "norm", "fastv", "--tokens", "4"]
    assert eval_command(run(*flags, limit=4)) == 0
    assert eval_command(run(*flags, "--positions", "original", "--size-bias", limit=4)) == 0
    parts = tmp_path / "out" / "answers" / "parts"
    names = {"norm-4", "fastv-4", "norm-4-original-sized"}
    assert {file.name.removesuffix(".0.jsonl") for file in parts.iterdir()} == names
    header = json.loads((parts / "norm-4-original-sized.0.jsonl").read_text().splitlines()[0])
    assert (header["setting"]["positions"], header["setting"]["size_bias"]) == ("original", True)
    results = results_of(tmp_path / "out")
    assert (results["positions"], results["size_bias"]) == ("original", True)
    assert all(row["prefill_seconds"]["median"] > 0 for row in results["rows"])
    assert eval_command(run("--method", "vanilla", "fastv", "--tokens", "4", "--no-size-bias")) == 2
    assert "--size-bias are for tokens that are chosen before the language model" in capsys.readouterr().err


def test_a_runs_options_are_on_the_model(load: Callable[..., tuple[Any, ...]]):
    tokenizer, model, image_processor, _ = load()
    asked = LlavaModel(model, tokenizer, image_processor, "vicuna_v1")
    with asked.attached(Run("norm", 4, positions="original", size_bias=False)):
        assert model.config.visionzip["method"] == "norm" and model.config.visionzip["keep"] == 4
        assert model.config.visionzip["positions"] == "original" and model.config.visionzip["size_bias"] is False
    assert not hasattr(model.config, "visionzip")


def test_images_that_cannot_be_read(run, scenes_data: Path, tmp_path: Path, capsys):
    """An error that keeps what is answered; with ``--skip-bad`` questions that are counted, and wrong."""
    table = pq.read_table(scenes_data / "test.parquet").slice(0, 24).to_pylist()
    broken = table[10]["image_id"]
    for row in table:
        if row["image_id"] == broken:
            row["image"]["bytes"] = row["image"]["bytes"][:100]
    folder = tmp_path / "broken"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(table), folder / "test.parquet")
    command = run("--method", "vanilla", "--data", str(folder), "--batch-size", "1")
    assert eval_command(command) == 2
    assert f"image {broken} of" in (message := capsys.readouterr().err) and "--skip-bad" in message
    assert eval_command([*command, "--skip-bad"]) == 0
    affected = sum(row["image_id"] == broken for row in table)
    assert f"vanilla: {affected} questions could not be asked" in capsys.readouterr().err
    assert len(results_of(tmp_path / "out")["not_asked"]["vanilla"]) == affected
    assert f"{affected} questions were not asked" in (table_file := tmp_path / "out" / "table.md").read_text()
    assert "0.0 ± 0.0* |" in table_file.read_text()  # the mark
    answers, _ = read_answers(tmp_path / "out" / "answers" / "vanilla.jsonl")
    assert sum("error" in answer.extra and not answer.text for answer in answers) == affected
    pq.write_table(pq.read_table(scenes_data / "test.parquet").slice(0, 24), folder / "test.parquet")  # it is repaired
    assert eval_command([*command, "--skip-bad"]) == 0  # it is another image: --skip-bad does not keep the error
    assert f"vanilla: {affected} of 24 questions are asked again" in capsys.readouterr().err
    assert results_of(tmp_path / "out")["not_asked"]["vanilla"] == []
    repaired = (tmp_path / "out" / "answers" / "vanilla.jsonl").read_bytes()
    assert eval_command(run("--method", "vanilla", "--output", str(tmp_path / "whole"))) == 0
    assert (tmp_path / "whole" / "answers" / "vanilla.jsonl").read_bytes() == repaired


def test_bad_input_is_explained_before_anything_is_loaded(run, unread, scenes_data: Path, tmp_path: Path, capsys):
    content, table = (scenes_data / "test.parquet").read_bytes(), pq.read_table(scenes_data / "test.parquet")
    folders = {name: tmp_path / name for name in ("damaged", "twice", "few")}
    for folder in folders.values():
        folder.mkdir()
    (folders["damaged"] / "test.parquet").write_bytes(content[:5000])
    pq.write_table(table.take([0, 1, 1]), folders["twice"] / "test.parquet")
    pq.write_table(table.drop_columns(["answer"]), folders["few"] / "test.parquet")
    for more, message in (
        (["--method", "pool"], "--method pool needs a budget: give --tokens"),
        (["--method", "vanilla", "--data", "nowhere"], "no file nowhere/test.parquet: give one by --data"),
        (["--method", "vanilla", "--data", str(folders["damaged"])], "test.parquet is not a readable parquet file"),
        (["--method", "vanilla", "--data", str(folders["twice"])], "has 1 ids more than once (1)"),
        (["--method", "vanilla", "--data", str(folders["few"])], "test.parquet has no column answer"),
        (["--method", "vanilla", "--model-path", "/nowhere"], "--model-path: there is no folder /nowhere"),
    ):
        assert eval_command([*run(), *more]) == 2, more
        assert message in capsys.readouterr().err
    assert eval_command(["table", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err


def test_grids_of_tiles(run, make_checkpoint, tmp_path: Path, capsys):
    """LLaVA-NeXT: budgets are per tile, what is counted is what the language model gets; pooling is refused."""
    command = run("--method", "vanilla", "visionzip", "--tokens", "6", model=make_checkpoint(**NEXT), limit=4)
    assert eval_command(command) == 0
    vanilla, zipped = results_of(tmp_path / "out")["rows"]
    assert vanilla["visual_tokens"] > 5 * 16  # newlines too
    assert (zipped["dominant"], zipped["contextual"], zipped["visual_tokens"]) == (5, 1, 5 * 6)
    assert eval_command([*command, "--method", "pool"]) == 2
    assert "averages areas, but this LlavaLlamaForCausalLM" in capsys.readouterr().err


def test_a_checkpoint_whose_own_setting_is_a_share(run, make_checkpoint, capsys):
    own = {"layer": -2, "merge": "released", "method": "norm", "keep": 0.5}
    assert eval_command(run("--method", "visionzip", model=make_checkpoint(visionzip=own), limit=2)) == 2
    assert "has the setting method='norm' keep=0.5 of its own" in capsys.readouterr().err


def test_answers_of_other_code_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    command = run("--method", "vanilla", limit=4)
    monkeypatch.setattr("eval.running.runner.git_commit", lambda: "c0ffee")
    assert eval_command(command) == 0
    monkeypatch.setattr("eval.running.runner.git_commit", lambda: "decade")
    assert eval_command(command) == 0
    assert "has answers of other code (commit c0ffee), which stay" in capsys.readouterr().err


def test_budgets_are_checked_before_the_first_answer(run, tmp_path: Path, capsys):
    for tokens, message in (("17", "an image has only 16 patches"), ("7", "tokens=7 cannot be pooled")):
        assert eval_command(run("--method", "vanilla", "pool", "--tokens", tokens)) == 2
        assert message in capsys.readouterr().err
    part = tmp_path / "out" / "answers" / "parts" / "vanilla.0.jsonl"
    assert len(part.read_text().splitlines()) == 1  # its header


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


def test_quickstart(make_checkpoint, scenes_data: Path, quick_python: Path, tmp_path: Path):
    """The script, as users start it, on another model and few questions; pip is left out, the environment is there."""
    model = make_checkpoint(vision={**CLIP, "image_size": 112})  # 8 x 8 patches
    out = tmp_path / "quickstart"
    places = {"VIRTUAL_ENV": str(quick_python), "MODEL_PATH": str(model), "OUTPUT": str(out)}
    script = str(ROOT / "scripts" / "quickstart.sh")
    command = ["bash", script, "--limit", "4", "--seeds", "1", "--data", str(scenes_data)]
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "visionzip 40+8" in done.stdout and "pool" in done.stdout
    assert {row["visual_tokens"] for row in results_of(out)["rows"]} == {64, 48, 32, 16}
    assert {"table.md", "results.json", "tokens.png", "scene.jpg"} <= {file.name for file in out.iterdir()}

"""``python -m eval run``: tables, budgets, what it refuses, the quickstart; on a tiny random model and test set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_results import results_of

from checkpoints import CLIP, NEXT
from eval.__main__ import main as eval_command
from eval.benchmarks import scenes
from eval.models.llava import LlavaModel
from eval.registry import BENCHMARKS
from eval.running.answer_files import read_answers
from eval.running.methods import METHODS, Run, plan
from llava.images import AS_STORED

ROOT = Path(__file__).resolve().parents[2]
# An average over both layers is more than half of the tokens, and SparseVLM's is published for 32 layers.
IN_TWO_LAYERS = [name for name, own in METHODS.items() if not (name.endswith("-average") or own.of_picture)]


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


def test_budgets_are_checked_before_the_first_answer(run, tmp_path: Path, capsys):
    for tokens, message in (("17", "an image has only 16 patches"), ("7", "tokens=7 cannot be pooled")):
        assert eval_command(run("--method", "vanilla", "pool", "--tokens", tokens)) == 2
        assert message in capsys.readouterr().err
    part = tmp_path / "out" / "answers" / "parts" / "vanilla.0.jsonl"
    assert len(part.read_text().splitlines()) == 1  # its header


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

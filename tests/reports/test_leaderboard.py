"""``python -m eval leaderboard``: the answers of ``eval run``, in one table, one JSON file and one plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from seam_checkpoints import save_checkpoint

from eval.__main__ import add_run_arguments
from eval.__main__ import main as eval_command
from eval.config import RunConfig
from eval.reports.leaderboard import default_methods
from eval.reports.leaderboard_plot import spaced
from eval.running.methods import METHODS
from eval.sharing import shared
from llava.commands.parsers import parser_of
from playground.scenes import TEST_SET, make_test_set, write_parquet
from visionzip.methods import METHODS as CHOOSING

SETS = ("shipped", "seed 777")
ASKED = ["vanilla", "visionzip", "random", "scope", "fastv"]


@pytest.fixture
def command(make_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Words of a short leaderboard of the tiny model (16 patches), whose second set is there already."""
    runs = tmp_path / "runs"
    write_parquet(list(make_test_set(seed=777, per_type=40)), runs / "seed-777.parquet")
    places = ["--model-path", str(make_checkpoint()), "--output", str(tmp_path / "docs"), "--runs", str(runs)]
    few = ["--limit", "12", "--seeds", "2", "--processes", "1", "--device", "cpu"]
    return ["leaderboard", *places, *few, "--method", *ASKED, "--tokens", "6", "4"]


def board_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "docs" / "leaderboard.json").read_text())


def test_a_leaderboard(command: list[str], tmp_path: Path, capsys):
    """Each method has accuracy, its error and what it is ahead of VisionZip on both sets, and the time of choosing."""
    assert eval_command(command) == 0
    board, printed = board_of(tmp_path), capsys.readouterr().out
    assert next(iter(board["methods"])) == "vanilla" and set(board["methods"]) == set(ASKED)
    others = [method["mean"] for method in board["methods"].values()][1:]
    assert others == sorted(others, reverse=True)
    assert board["questions"] == dict.fromkeys(SETS, 12) and (board["patches"], board["seeds"]) == (16, 2)
    for name, method in board["methods"].items():
        for entry in (method["scores"][each][budget] for each in SETS for budget in ("6", "4")):
            assert 0 <= entry["accuracy"] <= 100 and entry["standard_error"] >= 0
            assert (entry["ahead_of_visionzip"] is None) == (name in ("vanilla", "visionzip"))
        chooses = name in CHOOSING
        assert all(
            (ms is not None) == chooses and (ms is None or 0 < ms < 1e3) for ms in method["choosing_ms"].values()
        )
    table = (tmp_path / "docs" / "leaderboard.md").read_text()
    assert table.count("\n| ") == 2 + len(ASKED) and "| vanilla (16) |" in table and "<br>(" in table
    assert "random: mean of 2 seeds" in table and "vanilla (16)" in printed
    drawn = (tmp_path / "docs" / "leaderboard.svg").read_text()
    assert all(f">{name} " in drawn for name in ASKED if name != "vanilla") and len(drawn) < 100_000


def test_its_answers_are_those_of_eval_run(command: list[str], tmp_path: Path):
    assert eval_command(command) == 0
    model, out = command[command.index("--model-path") + 1], tmp_path / "alone"
    for name, data in (("shipped", TEST_SET), ("seed 777", tmp_path / "runs" / "seed-777.parquet")):
        words = ["--model-path", model, "--data", str(data), "--output", str(out / name), "--limit", "12"]
        assert eval_command(["run", "scenes", *words, "--device", "cpu", "--method", "scope", "--tokens", "6"]) == 0
        (row,) = json.loads((out / name / "results.json").read_text())["rows"]
        assert board_of(tmp_path)["methods"]["scope"]["scores"][name]["6"]["accuracy"] == row["score"]


def test_a_killed_leaderboard_goes_on(command: list[str], tmp_path: Path):
    """What is answered is not asked again; what a torn file lacks is, and the scores come out the same."""
    assert eval_command(command) == 0
    before, parts = board_of(tmp_path), tmp_path / "runs" / "seed-777" / "answers" / "parts"
    whole = {file.name: file.read_bytes() for file in parts.iterdir()}
    (parts / "fastv-4.0.jsonl").write_bytes(whole["fastv-4.0.jsonl"][:-30])
    (tmp_path / "docs" / "leaderboard.json").unlink()
    assert eval_command(command) == 0
    assert all(file.read_bytes() == whole[file.name] for file in parts.iterdir() if file.name != "fastv-4.0.jsonl")
    assert {name: method["scores"] for name, method in board_of(tmp_path)["methods"].items()} == {
        name: method["scores"] for name, method in before["methods"].items()
    }


def test_a_failed_run_is_named(command: list[str], capsys):
    assert eval_command([*command, "--tokens", "17"]) == 2
    assert "--tokens 17: an image has only 16 patches" in capsys.readouterr().err


def test_all_methods_are_in_it():
    """What is added to the registry is compared without another line here."""
    assert {"vanilla", "fastv", "sparsevlm", *CHOOSING} <= set(default_methods()) <= set(METHODS)


def test_labels_do_not_overlap():
    found = spaced([50, 50.1, 50.2, 70], gap=2)
    assert found == pytest.approx([48.1, 50.1, 52.1, 70])


@pytest.mark.parametrize(
    "changes",
    [
        {"method": ("vanilla", "pool"), "tokens": (4, 6), "skip_bad": True, "limit": 3},
        {"positions": "original", "size_bias": False, "data": "set.parquet", "device": "cpu"},
        {"dominant": 5, "contextual": 3, "load_8bit": True, "judge": "exact"},
    ],
)
def test_another_process_reads_the_same_configuration(changes: dict[str, Any], tmp_path: Path):
    config = RunConfig("scenes", "model", tmp_path / "out", **changes)
    parser = parser_of("python -m eval run", add_run_arguments)
    assert RunConfig.from_flags(parser.parse_args(["scenes", *config.flags()])) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.limit = 1


def test_processes_that_share_a_run_find_the_command():
    """The module that torchrun starts is one that can be started."""
    command = shared(2, ["run", "scenes"])
    module = command[command.index("run") - 1]
    assert find_spec(f"{module}.__main__") and command[command.index("--nproc_per_node") + 1] == "2"


def test_another_family_has_a_leaderboard_too(tmp_path: Path):
    """With smaller pictures beside what chooses; the time of choosing is known for LLaVA's alone."""
    write_parquet(list(make_test_set(seed=777, per_type=40)), tmp_path / "runs" / "seed-777.parquet")
    model = save_checkpoint("qwen3_vl", tmp_path)
    places = ["--model-path", str(model), "--output", str(tmp_path / "docs"), "--runs", str(tmp_path / "runs")]
    few = ["--limit", "2", "--processes", "1", "--device", "cpu", "--tokens", "6"]
    assert eval_command(["leaderboard", *places, *few, "--method", "vanilla", "visionzip", "resize"]) == 0
    board, table = board_of(tmp_path), (tmp_path / "docs" / "leaderboard.md").read_text()
    assert set(board["methods"]) == {"vanilla", "visionzip", "resize"} and board["patches"] == 64
    assert board["methods"]["visionzip"]["choosing_ms"] == {"6": None}
    assert "fastv" not in table and "hoosing" not in table and "mean of" not in table
    kept = [board["methods"]["resize"]["scores"][each]["6"]["visual_tokens"] for each in SETS]
    assert kept[0] == kept[1] <= 6 and f"| resize ({kept[0]:.4g}) |" in table  # whole rows of a smaller picture

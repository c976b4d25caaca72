"""Mini-Gemini through the commands: those that run as for LLaVA, and those that say why they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import TRAINER, command

from checkpoints import picture
from llava.cli import main as visionzip_command
from llava.eval.run_llava import main as run_llava
from llava.measure.mining import MINING, build_model, mining_of
from llava.serve.chat import ChatSession
from llava.train import train as llava_training
from visionzip import visionzip


@pytest.fixture
def flags(make_mgm: Callable[..., Path]) -> list[str]:
    return ["--model-path", str(make_mgm()), "--device", "cpu"]


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    picture(0).save(tmp_path / "cube.png")
    return str(tmp_path / "cube.png")


def test_a_chat(load_mgm, tokenizers) -> None:
    model = visionzip(load_mgm(), 4, 2)
    session = ChatSession(model, tokenizers[False], model.get_vision_tower().image_processor, max_new_tokens=4)
    first = session.ask("What is it?", [picture(0)])
    second = session.ask("And then?")
    assert (first.visual_tokens, second.visual_tokens) == (6, 0)
    assert second.cached_tokens > first.visual_tokens


def test_chat_in_the_terminal(
    flags: list[str], image_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["What is it?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    budget = ["--dominant", "4", "--contextual", "2", "--max-new-tokens", "3"]
    assert visionzip_command(["chat", *flags, *budget, "--image", image_file]) == 0
    printed = capsys.readouterr().out
    assert "MGMLlamaForCausalLM on cpu" in printed and "VisionZip 4 + 2 · template vicuna_v1" in printed
    assert "(6 visual)" in printed


def test_run_llava(flags: list[str], image_file: str) -> None:
    assert run_llava([*flags, "--image-file", image_file, "--query", "What?", "--max_new_tokens", "3"]) == 0


def test_visualize(flags: list[str], image_file: str, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    flags = [*flags, "--dominant", "4", "--contextual", "2", "--image", image_file, "--output", str(out)]
    assert visionzip_command(["visualize", *flags]) == 0
    assert (out / "tokens.png").is_file()


def test_benchmark_mining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time and memory are of three ways that compute the same; that is what is checked here."""
    monkeypatch.setattr("llava.measure.mining.peaks", lambda *args: {key: {"memory_mib": 100.0} for key in MINING})
    flags = ["--shape", "tiny", "--dominant", "20", "--contextual", "4", "--rounds", "2", "--device", "cpu"]
    assert visionzip_command(["benchmark", "mining", *flags, "--output", str(tmp_path / "mining.json")]) == 0
    rows = json.loads((tmp_path / "mining.json").read_text())["results"]
    assert [row["what"] for row in rows][:3] == ["released", "all", "kept"]
    assert all(len(row["seconds"]) == 2 for row in rows)


@torch.no_grad()
def test_what_the_benchmark_compares() -> None:
    model = build_model("tiny", "cpu", torch.float32)
    images = torch.randn(1, 3, 256, 256)
    released, ours, kept = (mining_of(way, model, images, (20, 4))() for way in ("released", "all", "kept"))
    assert released.shape == (1, 64, 64) and kept.shape == (1, 24, 64)
    torch.testing.assert_close(released, ours, atol=1e-5, rtol=1e-4)
    assert model.get_vision_tower().visionzip is None


# Refused


def refused(capsys: pytest.CaptureFixture[str], status: int, *parts: str) -> None:
    """One line about it, before anything is loaded or written."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and all(part in line for part in parts), line


def test_phases_are_not_timed(flags: list[str], unread, capsys) -> None:
    """The second tower and the mining would be counted as compression."""
    for what in ("prefill", "generate", "memory"):
        status = visionzip_command(["benchmark", what, *flags, "--tokens", "6"])
        refused(capsys, status, flags[1], "visionzip benchmark mining")


def test_no_conversion_to_transformers(make_mgm, tmp_path: Path, capsys) -> None:
    status = visionzip_command(["convert", str(make_mgm()), str(tmp_path / "out"), "--to", "transformers"])
    refused(capsys, status, "MGMLlamaForCausalLM", "no counterpart in transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tower", [False, True])
def test_no_training(make_mgm, world: Path, tmp_path: Path, unread, tower: bool, capsys) -> None:
    data = {"data_path": world / "data.json", "image_folder": world / "images", "output_dir": tmp_path / "out"}
    more = {"vision_tower": world / "tower"} if tower else {}
    what = {"model_name_or_path": make_mgm(), "tune_mm_mlp_adapter": True, **more}
    status = command(llava_training.main, **{**TRAINER, **data, **what})
    refused(capsys, status, "is a Mini-Gemini", "LLaVA-1.5")
    assert not (tmp_path / "out").exists()


def test_no_pooling(load_mgm) -> None:
    """An average of patches is no place to look closer at."""
    with pytest.raises(ValueError, match=r"averages areas, but this MGMLlamaForCausalLM needs to know which patch"):
        visionzip(load_mgm(), keep=4, method="pool")

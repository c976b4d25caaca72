"""Image benchmarks with a Mini-Gemini, through the same command as with LLaVA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_gemini import convnext, openclip_weights, write_mini_gemini
from test_end_to_end import WORDS, data_module, speaking

from checkpoints import CLIP, edit_weights
from eval.__main__ import main as eval_command
from eval.running.answer_files import read_answers


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., int]:
    """``python -m eval run`` with a model of 8 x 8 patches, into a folder of this test; its exit status."""

    def run(name: str, *flags: str, out: str = "out") -> int:
        folder = tmp_path / "MGM-tiny"
        if not folder.exists():
            write_mini_gemini(folder, vision={**CLIP, "image_size": 112}, image_size_aux=256)
            edit_weights(folder, lambda weights: speaking(weights, WORDS[name]))
            module, more = data_module(name)
            module.write_folder(tmp_path / "data", *more)
        places = ["--model-path", str(folder), "--data-root", str(tmp_path / "data"), "--output", str(tmp_path / out)]
        return eval_command(["run", name, *places, "--device", "cpu", *flags])

    return run


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of the table by method."""
    return {row["method"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}


def texts_of(file: Path) -> list[str]:
    return [answer.text for answer in read_answers(file)[0]]


@pytest.mark.parametrize("name", ["pope", "sqa"])  # ScienceQA has questions without an image too
def test_run(name: str, ask, tmp_path: Path) -> None:
    assert ask(name, "--method", "vanilla", "visionzip", "--tokens", "6", "--batch-size", "2") == 0
    out, (module, more) = tmp_path / "out", data_module(name)
    assert json.loads((out / "results.json").read_text())["conv_mode"] == "vicuna_v1"
    rows = rows_of(out)
    assert (rows["vanilla"]["visual_tokens"], rows["visionzip"]["visual_tokens"]) == (64, 6)
    for method, file in (("vanilla", "vanilla"), ("visionzip", "visionzip-6")):
        texts = texts_of(out / "answers" / f"{file}.jsonl")
        assert rows[method]["score"] == pytest.approx(module.expected(texts, *more), abs=1e-9)
        assert set(texts) <= set(WORDS[name])


def test_batches_do_not_matter_and_a_killed_run_goes_on(ask, tmp_path: Path) -> None:
    method = ("--method", "visionzip", "--tokens", "6")
    files = {}
    for size in ("1", "8"):
        assert ask("sqa", *method, "--batch-size", size, out=size) == 0
        files[size] = tmp_path / size / "answers" / "visionzip-6.jsonl"
    whole = files["1"].read_bytes()
    assert whole == files["8"].read_bytes() and len(set(texts_of(files["1"]))) > 1
    part = tmp_path / "1" / "answers" / "parts" / "visionzip-6.0.jsonl"
    part.write_bytes(part.read_bytes()[:-30])
    assert ask("sqa", *method, "--batch-size", "1", out="1") == 0
    assert files["1"].read_bytes() == whole


def test_the_other_methods(ask, tmp_path: Path, capsys) -> None:
    """All that choose patches run; pooling is refused before the first answer."""
    methods = ["dominant-only", "contextual-only", "no-cls", "uniform", "divprune", "fastv", "sparsevlm"]
    assert ask("pope", "--method", *methods, "--tokens", "6") == 0
    assert {method: row["visual_tokens"] for method, row in rows_of(tmp_path / "out").items()} == dict.fromkeys(
        methods, 6
    )
    capsys.readouterr()
    assert ask("pope", "--method", "vanilla", "pool", "--tokens", "6", out="controls") == 2
    assert "this MGMLlamaForCausalLM needs to know which patch" in capsys.readouterr().err
    for part in (tmp_path / "controls" / "answers" / "parts").iterdir():
        assert len(part.read_text().splitlines()) <= 1  # its setting


def test_another_high_resolution_tower_is_another_model(ask, tmp_path: Path, capsys) -> None:
    """Its weights lie outside the checkpoint, but the answers follow from them."""
    assert ask("pope", "--method", "vanilla") == 0
    torch.save(openclip_weights(convnext(seed=1)), tmp_path / "MGM-tiny-aux" / "open_clip_pytorch_model.bin")
    assert ask("pope", "--method", "vanilla") == 2
    assert "has answers of another setting" in capsys.readouterr().err

"""``visionzip benchmark prefill`` and ``generate`` of a checkpoint with its own processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from seam_checkpoints import save_checkpoint

from llava.cli import main as visionzip_command


@pytest.fixture(scope="module", params=["qwen3_vl", "internvl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(request.param, tmp_path_factory.mktemp("measure") / request.param)


def test_whole_answers(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Vision, prefill and decoding of pictures of 128 x 128; as many tokens as asked for in the KV cache.

    InternVL cuts a picture into four tiles and the whole of it; its budget is of all five.
    """
    grid = checkpoint.name == "qwen3_vl"
    command = ["benchmark", "generate", "--model-path", str(checkpoint), "--device", "cpu", "--rounds", "2"]
    command += [
        "--image-edge",
        "128",
        "--batch-size",
        "1",
        "2",
        "--new-tokens",
        "3",
        "--output",
        str(tmp_path / "a.json"),
    ]
    methods = ["vanilla", "visionzip", *(["resize"] if grid else ["fastv"])]
    assert visionzip_command([*command, "--method", *methods, "--tokens", "20"]) == 0
    assert "vision" in capsys.readouterr().out
    rows = {(row["batch"], row["method"]): row for row in json.loads((tmp_path / "a.json").read_text())["results"]}
    assert len(rows) == 6
    for (batch, method), row in rows.items():
        inside = method == "fastv"  # which prunes behind the first of two layers
        whole = 64 if grid else 5 * 16
        visual = {"vanilla": whole, "visionzip": 20, "resize": 16, "fastv": whole}[method]
        assert row["visual_tokens"] == visual
        assert row["layer_tokens"] == [row["prompt_tokens"], row["prompt_tokens"] - (whole - 20 if inside else 0)]
        assert set(row["seconds"]) == {"vision", "prefill", "decode", "first_token", "total"}
        assert row["flops"] is None and row["tokens_per_second"]["median"] > 0
        assert rows[batch, "vanilla"]["prompt_tokens"] - row["prompt_tokens"] == whole - visual


def test_what_does_not_fit(checkpoint: Path, capsys: pytest.CaptureFixture):
    command = ["benchmark", "prefill", "--model-path", str(checkpoint), "--device", "cpu", "--image-edge", "128"]
    refused = "fastv" if checkpoint.name == "qwen3_vl" else "resize"
    for more, message in (
        (["--tokens", "100"], "visual tokens here; give fewer"),
        (["--method", "vanilla", refused, "--tokens", "20"], refused),
        (["--compile", "--tokens", "20"], "--compile is for LLaVA's families"),
    ):
        assert visionzip_command([*command, *more]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]

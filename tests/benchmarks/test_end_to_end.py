"""Every benchmark through its own script, on a few questions in the real format, both ways; scores as by hand."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from checkpoints import CLIP
from eval.__main__ import main as eval_command
from eval.registry import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
VIDEO = ("tgif", "msvd", "msrvtt", "activitynet")
NAMED = {"mmbench_cn": "mmbench", **dict.fromkeys(VIDEO, "video")}  # whose data another module makes, by name
SERVER = ("vqav2", "vizwiz")  # LLaVA's folder has what only a server can score
NAMES = sorted(set(BENCHMARKS) - {"scenes"})


def data_module(name: str) -> tuple[ModuleType, tuple[str, ...]]:
    """The module that makes a benchmark's data, and what its functions want besides."""
    return importlib.import_module(f"data_{NAMED.get(name, name)}"), (name,) if name in NAMED else ()


def flags(name: str) -> list[str]:
    judge = ["--judge", "exact"] if BENCHMARKS[name].judged and name != "llavabench" else []
    return ["--device", "cpu", "--batch-size", "2", *judge]


def check(name: str, out: Path, *, folder: bool) -> None:
    """The result's score is that of the texts in the answers file, by the data module's own reckoning."""
    module, more = data_module(name)
    results = json.loads((out / "results.json").read_text())
    records = [json.loads(line) for line in (out / "answers" / "visionzip-6.jsonl").read_text().splitlines()]
    assert len(records) == results["questions"] and not results["not_asked"]["visionzip-6"]
    (row,) = results["rows"]
    texts = [record["text"] for record in records]
    if folder and name in SERVER:
        (file,) = (out / "submissions" / "visionzip-6").iterdir()
        assert json.loads(file.read_text()) == module.expected_submission(texts) and "score" not in row
    elif name == "llavabench":  # without a judge
        assert "score" not in row
    else:
        assert row["score"] == pytest.approx(module.expected(texts, *more), abs=1e-9)
    assert 0 < row["visual_tokens"] <= 6 * 8


@pytest.mark.parametrize("name", NAMES)
def test_script(name: str, make_checkpoint, tmp_path: Path):
    """``bash scripts/eval/NAME.sh`` on LLaVA's folder."""
    module, more = data_module(name)
    module.write_folder(tmp_path / "data", *more)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] || exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    settings = {
        "VIRTUAL_ENV": str(tmp_path / "venv"),
        "MODEL_PATH": str(make_checkpoint(vision={**CLIP, "image_size": 112})),
        "METHOD": "visionzip",
        "DATA_ROOT": str(tmp_path / "data"),
        "OUTPUT": str(tmp_path / "out"),
        "HF_HUB_OFFLINE": "1",
    }
    command = ["bash", str(ROOT / "scripts" / "eval" / f"{name}.sh"), "--tokens", "6", *flags(name)]
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    check(name, tmp_path / "out", folder=True)
    assert "visionzip 5+1" in done.stdout


@pytest.mark.parametrize("name", [name for name in NAMES if BENCHMARKS[name].tables])
def test_tables(name: str, make_checkpoint, tmp_path: Path):
    """The Hugging Face data set, as a local copy of its parquet files."""
    module, more = data_module(name)
    module.write_tables(tmp_path / "tables", *more)
    model = make_checkpoint(vision={**CLIP, "image_size": 112})
    places = ["--model-path", str(model), "--from-hub", str(tmp_path / "tables"), "--output", str(tmp_path / "out")]
    assert eval_command(["run", name, *places, "--method", "visionzip", "--tokens", "6", *flags(name)]) == 0
    check(name, tmp_path / "out", folder=False)

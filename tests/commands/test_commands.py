"""The commands, as users type them, and the snippet that they know."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import CLIP, picture
from llava.cli import main as visionzip_command
from llava.eval.run_llava import eval_model
from llava.eval.run_llava import main as run_llava
from llava.measure.tower import WAYS, build_tower, forward_of
from llava.serve.cli import main as llava_cli
from visionzip.methods import METHODS


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    picture(0).save(tmp_path / "cube.png")
    return tmp_path / "cube.png"


def run(*command: str, python: str = sys.executable, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *command], capture_output=True, text=True, timeout=120, check=False, **kwargs)


def test_visionzip_chat(make_checkpoint, quick_python: Path, image_file: Path):
    """As a user types it: two questions, another image, and a wrong file that does not end the chat."""
    lines = ["What is shown?", "And behind it?", "/image [/x].png", f"/image {image_file}", "And here?", "/exit"]
    flags = ["--temperature", "0", "--max-new-tokens", "4", "--dominant", "5", "--contextual", "2"]
    command = ["-m", "llava.cli", "chat", "--model-path", str(make_checkpoint()), "--image", str(image_file), *flags]
    done = run(*command, python=str(quick_python / "bin/python"), input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr and "%|" not in done.stderr  # no bars in a log
    assert "VisionZip 5 + 2" in done.stdout and "\x1b" not in done.stdout
    costs = [line for line in done.stdout.splitlines() if "tokens in" in line]
    assert ["(7 visual)" in line for line in costs] == [True, False, True]
    assert [" 0 cached" in line for line in costs] == [True, False, False]
    assert all("prefill" in line and "tokens out" in line for line in costs)
    assert "no image file at [/x].png" in done.stdout


def test_chat_settings(make_checkpoint, image_file: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """``visionzip chat`` compresses unless told not to; LLaVA's own command leaves the model as it is."""
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    model = ["--model-path", str(make_checkpoint()), "--device", "cpu"]
    with pytest.warns(UserWarning, match="nothing will be compressed"):  # 54 + 10 of this tower's 17 tokens
        assert visionzip_command(["chat", *model]) == 0
    assert "VisionZip 54 + 10" in capsys.readouterr().out
    assert visionzip_command(["chat", *model, "--vanilla"]) == 0
    assert llava_cli([*model, "--image-file", str(image_file), "--conv-mode", "vicuna_v1"]) == 0
    assert capsys.readouterr().out.count("not zipped") == 2


def test_commands_explain_bad_input(make_checkpoint, image_file: Path, tmp_path: Path, capsys):
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    model = ["--model-path", str(make_checkpoint())]
    for arguments, message in (
        (["chat", *model, "--image", str(text)], "notes.png is not a readable image"),
        (["chat", *model, "--image", "none.png"], "no image file at none.png"),
        (["chat", *model, "--dominant", "0"], "dominant=0 is below 1"),
        (["chat", "--model-path", "/nowhere"], "there is no folder /nowhere"),
        (["chat", *model, "--temperature", "-1"], "temperature=-1.0 is below 0"),
        (["chat", *model, "--vanilla", "--dominant", "5"], "a setting was given too"),
        (["benchmark", "tower", "--device", "cuda"], "this machine has no CUDA"),
        (["benchmark", "tower", "--device", "gpu"], "--device gpu is no device"),
        (["benchmark", "tower", "--output", str(tmp_path)], f"--output {tmp_path} is a folder"),
    ):
        assert visionzip_command(arguments) == 2, arguments
        assert message in capsys.readouterr().err


def test_run_llava(make_checkpoint, image_file: Path, capsys):
    model = ["--model-path", str(make_checkpoint()), "--image-file", f"{image_file},{image_file}"]
    flags = ["--temperature", "0", "--max_new_tokens", "5", "--num_beams", "2", "--query", "Compare them."]
    assert run_llava([*model, *flags]) == 0
    vanilla = capsys.readouterr().out
    assert run_llava([*model, *flags, "--dominant", "3", "--contextual", "1"]) == 0
    assert vanilla.strip() and capsys.readouterr().out != vanilla


def test_eval_model(make_checkpoint, image_file: Path, capsys):
    """With an object of LLaVA's attributes; a placeholder says where the image goes."""

    image = image_file

    class Arguments:
        model_path = str(make_checkpoint())
        model_base = conv_mode = None
        image_file = str(image)
        sep = ","
        query = "What is <image-placeholder>?"
        temperature, top_p, num_beams, max_new_tokens = 0.7, 0.9, 1, 3

    torch.manual_seed(0)
    answer = eval_model(Arguments)
    assert answer and capsys.readouterr().out == answer + "\n"
    torch.manual_seed(0)
    Arguments.query = "What is <image>?"
    assert eval_model(Arguments) == answer
    Arguments.conv_mode = "vicuna"
    with pytest.raises(ValueError, match="conv_mode='vicuna' is unknown"):
        eval_model(Arguments)


SNIPPET = """
from llava.model.builder import load_pretrained_model
from llava.mm_utils import get_model_name_from_path
from llava.eval.run_llava import eval_model
from visionzip import visionzip
model_path = "{folder}"
tokenizer, model, image_processor, context_len = load_pretrained_model(
    model_path=model_path, model_base=None, model_name=get_model_name_from_path(model_path))
model = visionzip(model, dominant=54, contextual=10)
args = type("Args", (), {{
    "model_path": model_path, "model_base": None, "model_name": get_model_name_from_path(model_path),
    "query": "What is shown here?", "conv_mode": None, "image_file": "{image}", "sep": ",",
    "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 4,
}})()
eval_model(args)
import torch
print(tuple(model.encode_images(torch.randn(1, 3, 112, 112)).shape))
"""


def test_the_snippet_of_the_released_package(make_checkpoint, quick_python: Path, image_file: Path):
    folder = make_checkpoint(vision={**CLIP, "image_size": 112})  # 65 tokens
    done = run("-c", SNIPPET.format(folder=folder, image=image_file), python=str(quick_python / "bin/python"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 64, 32)"


def test_the_benchmark_compares_the_same_method():
    """Zipped and the released way give the same tokens, vanilla and unzipped the same features."""
    tower = build_tower("tiny", "cpu", torch.float32)
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        results = {way: forward_of(way, tower, 9, 3)(images) for way in WAYS}
    torch.testing.assert_close(results["unzipped"], results["vanilla"])
    torch.testing.assert_close(results["zipped"], results["released"])
    assert results["zipped"].shape == (2, 12, 64)


@pytest.mark.usefixtures("quick_starts")
def test_benchmark_tower(tmp_path: Path, capsys):
    output = tmp_path / "results" / "tower.json"
    command = ["benchmark", "tower", "--shape", "tiny", "--batch-size", "2", "--rounds", "2", "--output", str(output)]
    assert visionzip_command(command) == 0
    report = json.loads(output.read_text())
    assert report["torch"] == torch.__version__
    rows = {row["way"]: row for row in report["results"]}
    assert set(rows) == {"vanilla", "unzipped", "zipped", "released"}
    assert [row["visual_tokens"] for row in rows.values()] == [64] * 4  # 54 + 10
    assert rows["vanilla"]["time_ratio"] == rows["vanilla"]["memory_ratio"] == 1
    assert all(row["seconds"] > 0 and row["memory_mib"] > 0 for row in rows.values())
    assert [row["method"] for row in report["choosing"]] == list(METHODS)  # of the same rounds
    for row in report["choosing"]:
        assert (row["batch"], row["tokens"]) == (2, 64)
        assert set(row["seconds"]) == {"read", "projection", "choice"} and row["seconds"]["choice"]["median"] > 0
        assert row["share_with_projection"]["median"] >= row["share"]["median"] > 0
    assert "zipped" in capsys.readouterr().out


def test_choosing_some_tokens(monkeypatch: pytest.MonkeyPatch, capsys):
    """26 cells do not fit the grid: one method less if none was asked for, else an error before anything is run."""
    monkeypatch.setattr("llava.measure.tower.peaks", lambda work, ways, *args, **kwargs: peaks_of(ways))
    command = ["benchmark", "tower", "--shape", "tiny", "--dominant", "20", "--contextual", "6", "--rounds", "1"]
    assert visionzip_command([*command, "--batch-size", "1", "--device", "cpu"]) == 0
    assert "pool: tokens=26 cannot be pooled" in capsys.readouterr().out
    assert visionzip_command([*command, "--method", "scope", "pool", "--device", "cpu"]) == 2
    assert "tokens=26 cannot be pooled" in capsys.readouterr().err


def peaks_of(ways: Iterable[str]) -> dict[str, dict[str, float]]:
    return {way: {"memory_mib": 100.0} for way in ways}

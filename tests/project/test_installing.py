"""What users are told to install, and what the scripts install: names that are ours, once, and in few words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from llava.cli import main as visionzip_command

ROOT = Path(__file__).resolve().parents[2]
NAME = "llava-visionzip"
WRITTEN = [
    path
    for pattern in ("*.md", "*.txt", "*.cff", "*.py", "*.sh")
    for folder in ("", "llava/", "visionzip/", "eval/", "playground/", "scripts/", "docs/", "checkpoints/", "tests/")
    for path in sorted(ROOT.glob(f"{folder}**/{pattern}" if folder else pattern))
]


def test_only_names_of_ours_are_advised():
    """`visionzip` on the index is somebody else's: what is advised has our name and an extra of ours."""
    pattern = r"""pip install ["']?([\w-]*visionzip)\b(?:\\?\[(\w+))?"""
    advised = [
        (path.name, *found) for path in WRITTEN for found in re.findall(pattern, path.read_text(encoding="utf-8"))
    ]
    assert len(advised) > 5
    assert [found for found in advised if found[1] != NAME] == []
    assert {extra for *_, extra in advised if extra} <= {*metadata.metadata(NAME).get_all("Provides-Extra")}


@pytest.mark.parametrize(
    ("library", "words", "extra"),
    [
        ("pyarrow", ["eval", "run", "scenes", "--tokens", "16", "--output", "out"], "eval"),
        ("pandas", ["eval", "run", "mmbench", "--tokens", "16", "--output", "out"], "eval"),
        (
            "matplotlib",
            ["benchmark", "prefill", "--shape", "llava-1.5-mini", "--tokens", "64", "--plot", "x.png"],
            "figures",
        ),
        ("av", ["chat", "--video", "clip.mp4"], "video"),
    ],
)
def test_a_missing_library_is_one_line(library, words, extra, tmp_path: Path, monkeypatch, capsys):
    """Before the model is loaded, with what to install."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(
        "llava.commands.loading.load_pretrained_model", lambda *_, **__: pytest.fail("the model is loaded")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench/mmbench_dev_20230712.tsv").write_text("index\timage\n")
    if words[0] != "benchmark":
        words = [*words, "--model-path", str(ROOT / "checkpoints/llava-mini")]
    if "mmbench" in words:
        words = [*words, "--data", str(tmp_path / "mmbench")]
    assert visionzip_command(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("visionzip ") and line.endswith(f'pip install "{NAME}[{extra}]"')


def test_training_without_its_extra_is_one_line():
    """Also where a module that is imported first would need it, so in a process of its own."""
    script = (
        "import runpy, sys\n"
        "sys.modules |= {'matplotlib': None, 'deepspeed': None, 'peft': None, 'wandb': None}\n"
        "sys.argv = ['train', '--deepspeed', 'scripts/zero2.json']\n"
        "runpy.run_module('llava.train.train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f'llava.train.train: training needs matplotlib and deepspeed: pip install "{NAME}[train]"'
    )


def test_installed_benchmarks_advise_their_own_command(tmp_path: Path, monkeypatch, capsys):
    """Of `visionzip eval`, not of the repository's `python -m eval`."""
    monkeypatch.chdir(tmp_path)
    model = ["--model-path", str(ROOT / "checkpoints/llava-mini"), "--tokens", "16", "--output", "out"]
    for words, cure in (
        (["prepare", "scenes", "--data-root", "."], "playground/data/eval/scenes/test.parquet of the repository"),
        (["run", "gqa", *model, "--data", "."], "`visionzip eval prepare`"),
        (["table", "."], "`visionzip eval run"),
    ):
        assert visionzip_command(["eval", *words]) == 2
        said = capsys.readouterr()
        assert cure in said.out + said.err and "python -m eval" not in said.out + said.err


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a script, with a virtual environment whose pip writes down what it is asked, and fails by a file "broken"."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        f'[ "$1 $2" = "-m pip" ] || exec "{sys.executable}" "$@"\n'
        f'cd "{tmp_path}"; echo "$@" >>asked; echo a lot of words\n'
        '[ "$3" != install ] || [ ! -e broken ] || { echo ERROR: no network; exit 1; }\n'
    )
    python.chmod(0o755)
    return {**os.environ, "VIRTUAL_ENV": str(tmp_path / "venv")}


def sourced(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; source {ROOT}/scripts/env.sh; use_environment; echo ready"
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_scripts_install_once_and_quietly(environment: dict[str, str], tmp_path: Path):
    done = sourced(environment)
    assert done.returncode == 0, done.stderr
    assert (
        len(done.stdout.split("\n")) == 4 and "a lot of words" not in done.stdout
    )  # a blank line, one of progress, ready
    assert "a lot of words" in (tmp_path / "venv/visionzip-install.log").read_text()
    asked = (tmp_path / "asked").read_text()
    installed = re.search(r"-e \S+\[([a-z,]+)\]", asked)[1].split(",")
    assert set(installed) == {"demo", "dev", "docs", "eval", "figures", "quant", "train", "video"}
    again = sourced(environment)
    assert again.stdout == "ready\n" and (tmp_path / "asked").read_text() == asked


def test_scripts_say_why_pip_failed(environment: dict[str, str], tmp_path: Path):
    (tmp_path / "broken").touch()
    done = sourced(environment)
    assert done.returncode == 1 and "ready" not in done.stdout
    assert "ERROR: no network" in done.stderr and "visionzip-install.log" in done.stderr
    (tmp_path / "broken").unlink()
    assert sourced(environment).returncode == 0  # nothing of it counts as installed


def test_all_scripts_share_the_environment():
    """None installs anew what another did."""
    calls = [line for path in ROOT.glob("scripts/**/*.sh") for line in path.read_text().splitlines()]
    assert not [line for line in calls if re.match(r"\s*use_environment [a-z]", line)]


def test_the_readme_names_files_that_exist_and_the_pinned_torch():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"--model-path (checkpoints/\S+).*--image (\S+)", readme)
    assert shown and all((ROOT / file).exists() for pair in shown for file in pair)
    (pin,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"{pin} --index-url https://download.pytorch.org/whl/cpu" in readme

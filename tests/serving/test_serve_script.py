"""``scripts/serve.sh`` up to where vLLM starts: which checkpoint it converts, and what it serves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In the place of the environment of 3.5 GB: converts by copying, and says what vLLM would have been given.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *" convert "*) cp -r "$4" "$5" ;;
    *) printf '%s\\n' "$@" ;;
esac
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The script beside what it reads, with its environment installed."""
    root = tmp_path / "repository"
    (root / "scripts").mkdir(parents=True)
    for name in ("scripts/serve.sh", "scripts/env.sh", "constraints-serve.txt", "setup.py"):
        shutil.copy(ROOT / name, root / name)
    environment = root / ".venv-serve"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").write_text(PYTHON)
    (environment / "bin/python").chmod(0o755)
    installed = "{ pwd && cat constraints-serve.txt setup.py; } | cksum"
    (environment / "visionzip-installed").write_text(
        subprocess.check_output(["bash", "-c", installed], cwd=root, text=True)
    )
    return root


def checkpoint(folder: Path, mark: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlavaLlamaForCausalLM"]}')
    (folder / "mark").write_text(mark)
    os.utime(folder / "config.json", (0, 0))  # older than any conversion
    return folder


def served(root: Path, model: str, cwd: Path, **settings: str) -> list[str]:
    words = ["bash", str(root / "scripts/serve.sh"), "--max-model-len", "512"]
    return subprocess.check_output(words, cwd=cwd, env=os.environ | {"MODEL_PATH": model} | settings, text=True).split(
        "\n"
    )


def test_checkpoints_of_one_name_are_not_mixed_up(repository: Path, tmp_path: Path):
    one, other = checkpoint(tmp_path / "one/llava", "1"), checkpoint(tmp_path / "other/llava", "2")
    for path, mark in ((one, "1"), (other, "2"), (one, "1")):
        said = served(repository, str(path), tmp_path)
        assert (Path(said[said.index("--model") + 1]) / "mark").read_text() == mark


def test_a_relative_path_is_the_callers(repository: Path, tmp_path: Path):
    checkpoint(tmp_path / "mine", "1")
    said = served(repository, "mine", tmp_path, SETTING='{"keep": 8}', PORT="8001")
    assert (Path(said[said.index("--model") + 1]) / "mark").read_text() == "1"
    assert said[said.index("--host") + 1] == "127.0.0.1" and said[said.index("--port") + 1] == "8001"
    assert said[said.index("--hf-overrides") + 1] == '{"visionzip": {"keep": 8}}'
    assert said[-3:] == ["--max-model-len", "512", ""]

"""Files and functions that one can read in a sitting: few lines, and few files side by side."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES_OF_FILE = 300
LINES_OF_FUNCTION = 50  # without its docstring
FILES_OF_FOLDER = 13  # a dozen, and an __init__.py or a README

# A folder in which each file is one of a kind has as many as there are.
ANY_NUMBER = {
    "eval/benchmarks": "a benchmark a file",
    "scripts": "a command a script, and DeepSpeed's settings",
    "scripts/eval": "a script a benchmark",
    "tests/golden": "recorded tensors",
}


@pytest.fixture(scope="module")
def files() -> list[str]:
    """Those that git knows of."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_files_are_short(files: list[str]):
    code = [name for name in files if name.endswith(".py")]
    long = {name for name in code if len((ROOT / name).read_text().splitlines()) > LINES_OF_FILE}
    assert not long, "split by concept what is too long"


def test_functions_are_short(files: list[str]):
    long = set()
    for name in files:
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                if isinstance(node, ast.FunctionDef) and code_lines(node) > LINES_OF_FUNCTION:
                    long.add((name, node.name))
    assert not long, "give its steps names"


def code_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    said = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - said * (first.end_lineno - first.lineno + 1)


def test_folders_are_small(files: list[str]):
    folders = Counter(str(PurePosixPath(name).parent) for name in files)
    crowded = {name for name, count in folders.items() if count > FILES_OF_FOLDER}
    assert crowded == ANY_NUMBER.keys(), "group the files by subject, and leave out what no longer is crowded"

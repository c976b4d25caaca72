"""Everything in examples/ runs, and says what its readers are told."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import llava.methods
from visionzip.integrations import _REGISTERED, REGISTRY
from visionzip.methods import METHODS, Method

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {  # arguments, and what is printed
    "zip_llava.py": ([], "all tokens: 144 .* orange\nzipped: 48 .* orange\nunzipped: 144 .* orange\n"),
    "zip_transformers.py": (
        [],
        r"qwen3_vl, all tokens: prompts of 5\d tokens, answers \w+, \w+\n"
        r"qwen3_vl, zipped: prompts of 3\d tokens, .*"
        r"llava, all tokens: prompts of (\d+) tokens, answers yellow, (\w+)\n"
        r"llava, zipped: prompts of (\d+) tokens, answers yellow, \2\n"
        r".*loaded: prompts of \3 tokens, answers yellow, \2\n",
    ),
    "add_method.py": (["28"], r"visionzip 27\+5\s.*random\s.*contrast\s"),
    "add_family.py": ([], "keep=1.0: 16 of 16 .*keep=0.5: 8 of 16 .*keep=0.25: 4 of 16 "),
    "tune_and_merge.py": (["2"], r"loss: \d\.\d+ to \d\.\d+ in 2 steps\nwrote .* VisionZip 13 \+ 3"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder; what an example registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    registries = [(registry, dict(registry)) for registry in (METHODS, REGISTRY, _REGISTERED)]
    yield
    for registry, before in registries:
        registry.clear()
        registry.update(before)


def test_all_are_here_and_in_the_readme():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)
    assert re.findall(r"^\| \[([\w.]+)\]", table, re.MULTILINE) == [*SAYS, "visionzip.ipynb"]


def test_a_method_that_is_added_late_can_be_evaluated():
    METHODS["late"] = Method("late", "added behind all imports", lambda read, counts, config: None)
    assert llava.methods.METHODS["late"].summary == "added behind all imports"
    assert [*llava.methods.METHODS][:3] == ["vanilla", "resize", "visionzip"] and "fastv" in llava.methods.METHODS


@pytest.mark.parametrize("name", SAYS)
def test_a_script(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    arguments, said = SAYS[name]
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60 and f"python examples/{name}" in ast.get_docstring(ast.parse(text))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with suppress_exit():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(said, capsys.readouterr().out, re.DOTALL)


@contextmanager
def suppress_exit() -> Iterator[None]:
    """Lets a script end itself, if it is with success."""
    try:
        yield
    except SystemExit as end:
        assert not end.code


def test_the_notebook_says_what_it_has_stored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads((EXAMPLES / "visionzip.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    pictures = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
            stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            assert capsys.readouterr().out == stored
            pictures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
    assert pictures == 3

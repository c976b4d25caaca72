"""What is imported of our own modules is there, also where no test runs it: in functions, scripts, and shell."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("eval", "llava", "playground", "visionzip")
IN_SHELL = re.compile(r"^from ((?:eval|llava|playground|visionzip)[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def imported() -> Iterator[tuple[Path, str, str]]:
    """Each file, the module that it names, and what it takes of that."""
    for top in (*OURS, "examples", "scripts", "tests"):
        for file in (ROOT / top).rglob("*.py"):
            package = ".".join(file.relative_to(ROOT).parent.parts)
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom):
                    name = "." * node.level + (node.module or "")
                    module = importlib.util.resolve_name(name, package)
                    yield from ((file, module, alias.name) for alias in node.names)
    for file in (ROOT / "scripts").rglob("*.sh"):
        for module, names in IN_SHELL.findall(file.read_text()):
            yield from ((file, module, name.strip()) for name in names.split(","))


@cache
def names_of(module: str) -> frozenset[str] | None:
    """Whatever a module gives a name to; None if there is no such module."""
    place = ROOT.joinpath(*module.split("."))
    file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
    if not file.is_file():
        return frozenset() if place.is_dir() else None
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


def test_imports_lead_somewhere():
    lost = [
        f"{file.relative_to(ROOT)}: {module}.{name}"
        for file, module, name in imported()
        if module.partition(".")[0] in OURS
        and name not in (names_of(module) or ())
        and names_of(f"{module}.{name}") is None
    ]
    assert not lost

"""Where the modules of ``eval/`` may look: downward, never in a circle, so that each is read and tested alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

EVAL = Path(__file__).resolve().parents[2] / "eval"


def imports() -> dict[str, set[str]]:
    """What each module imports of the package, also in functions and for types alone, by dotted names below it."""
    modules = {".".join(file.relative_to(EVAL).with_suffix("").parts): file for file in EVAL.rglob("*.py")}
    modules = {name.removesuffix("__init__").rstrip("."): file for name, file in modules.items()}
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                module = ".".join(filter(None, base))
                below = {f"{module}.{alias.name}".lstrip(".") for alias in node.names} & modules.keys()
                found[name] |= below or {module}
    return found


def test_no_module_of_eval_imports_in_a_circle():
    graph = imports()
    assert "records" in graph["reading.sources"] and "reading.tables" in graph["benchmark"]  # it is read at all
    assert len(graph) > 40
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert order.index("records") < order.index("benchmark") < order.index("running.runner") < order.index("__main__")

"""``visionzip benchmark gpu`` on tiny shapes: its report, and what stays when a section fails or has no time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llava.cli import main
from llava.measure.gpu import report as gpu_report
from llava.measure.gpu.graphs import GREEDY, captured, chooser, measure_choosers, random_read
from llava.measure.gpu.sections import SECTIONS, Section, gpu_tests
from llava.measure.gpu.tables import BEGIN, END
from llava.measure.models.qwen import SHAPES, grid_of
from llava.measure.report import spread

ROOT = Path(__file__).resolve().parents[2]
SCALED = ["benchmark", "gpu", "--scaled", "--device", "cpu"]
MEASURED = [name for name in SECTIONS if name != "tests"]  # those are pytest's


def report_of(*flags: str, output: Path) -> dict[str, Any]:
    assert main([*SCALED, "--output", str(output), *flags]) == 0
    return json.loads(output.read_text())


def test_all_sections_on_tiny_shapes(tmp_path: Path):
    document, output = tmp_path / "efficiency.md", tmp_path / "results" / "gpu.json"
    document.write_text((ROOT / "docs" / "efficiency.md").read_text())
    before, after = document.read_text().split(BEGIN)[0], document.read_text().split(END)[1]
    report = report_of("--docs", str(document), "--sections", *MEASURED, output=output)

    assert report["scaled"] and report["torch"] == torch.__version__ and report["cuda"]
    assert {name: own["state"] for name, own in report["sections"].items()} == dict.fromkeys(MEASURED, "done")
    rows = {name: own["rows"] for name, own in report["sections"].items()}
    assert [row["same_quarter"] for row in rows["kernels"]] == [1, 1, 1]
    tokens = {row["way"]: row["visual_tokens"] for row in rows["qwen2.5-vl-7b"]}  # 8 x 6 of 28 x 28 pixels
    assert tokens == {"vanilla": 48, "visionzip-0.5": 24, "visionzip-0.25": 12, "resize-0.25": 12}
    ways = ["vanilla", "visionzip-32", "visionzip-16", "fastv-16", "sparsevlm-16"]
    assert [(row["batch"], row["way"]) for row in rows["llava-1.5-7b"]] == [(b, way) for b in (1, 2) for way in ways]
    for row in rows["llava-next-7b"] + rows["qwen3-vl-8b"]:
        assert row["seconds"]["first_token"]["median"] > row["seconds"]["prefill"]["median"] > 0
        assert row["tokens_per_second"]["median"] > 0 and row["memory_mib"] >= 0 < row["kv_cache_mib"]
    assert {row["method"] for row in rows["choosing"]} >= {"visionzip", "cen-prune", "random"}
    assert [row["method"] for row in rows["compile"]] == list(GREEDY) and all(r["same_choice"] for r in rows["compile"])
    assert [row["visual_tokens"] for row in rows["tuning"]] == [64, 64, 12, 12]

    written = document.read_text()
    assert written.startswith(before) and written.endswith(after)
    assert "A scaled run" in written and "Not measured" not in written.split(BEGIN)[1]
    assert written.count("| qwen3-vl-tiny | 224 x 160 |") == 4


# --- sections that do not end well ---


def works(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"way": request["dtype"]}


def fails(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"way": "first"}
    raise torch.OutOfMemoryError("no room for the second")


def crashes(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"way": "first"}
    os._exit(3)


def never_ends(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"way": "first", "child": subprocess.Popen(["sleep", "600"]).pid}
    time.sleep(600)


def section(run: Any, estimate: float = 0) -> Section:
    return Section("a test", "none", run, estimate, {}, {})


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> dict[str, Section]:
    own: dict[str, Section] = {}
    monkeypatch.setattr(gpu_report, "SECTIONS", own)
    return own


def test_a_section_that_fails_leaves_its_rows_and_the_others(sections: dict[str, Section], tmp_path: Path, capsys):
    sections |= {"fails": section(fails), "crashes": section(crashes), "works": section(works)}
    found = report_of(output=tmp_path / "gpu.json")["sections"]
    assert [(own["state"], own["rows"]) for own in found.values()] == [
        ("failed", [{"way": "first"}]),
        ("failed", [{"way": "first"}]),
        ("done", [{"way": "float32"}]),
    ]
    assert found["fails"]["why"].endswith("OutOfMemoryError: no room for the second")
    assert "in fails" in found["fails"]["traceback"] and found["crashes"]["why"] == "its process ended with status 3"
    assert "fails: failed, 1 rows" in capsys.readouterr().out


def test_the_limit_ends_a_section_with_what_it_has(sections: dict[str, Section], tmp_path: Path):
    document = tmp_path / "page.md"
    document.write_text(f"{BEGIN}\n{END}")
    sections["works"] = section(works)
    report_of(output=tmp_path / "gpu.json")  # libraries are loaded now
    sections |= {"never-ends": section(never_ends), "late": section(works)}
    flags = ["--sections", "never-ends", "late", "--minutes", "0.1", "--docs", str(document)]
    began = time.monotonic()
    found = report_of(*flags, output=tmp_path / "gpu.json")["sections"]
    assert time.monotonic() - began < 30 and found["works"]["state"] == "done"
    assert found["never-ends"]["state"] == "stopped" and len(found["never-ends"]["rows"]) == 1
    assert found["late"]["state"] == "skipped" and "0 s are left" in found["late"]["why"]
    child = Path(f"/proc/{found['never-ends']['rows'][0]['child']}/stat")  # ended too, if not yet waited for
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert "- late (a test): skipped." in document.read_text()


def test_a_second_call_adds_sections(sections: dict[str, Section], tmp_path: Path, capsys):
    output = tmp_path / "gpu.json"
    sections |= {"first": section(works), "second": section(works)}
    assert list(report_of("--sections", "second", output=output)["sections"]) == ["second"]
    report = report_of("--sections", "first", output=output)
    assert [(name, own["state"]) for name, own in report["sections"].items()] == [("first", "done"), ("second", "done")]
    output.write_text(json.dumps(report | {"device": "another card"}))
    assert main([*SCALED, "--output", str(output), "--sections", "first"]) == 2
    assert "has figures with device another card, here it is" in capsys.readouterr().err


# --- the parts ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["benchmark", "gpu", "--device", "cpu"], "--device cpu: true shapes need a GPU of 80 GB; --scaled tries"),
        ([*SCALED, "--minutes", "0"], "--minutes 0 must be above 0"),
        ([*SCALED, "--docs", str(ROOT / "LICENSE")], "must have the lines '<!-- gpu report:"),
    ],
)
def test_bad_input(flags: list[str], message: str, capsys):
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_the_shapes_are_the_true_ones():
    """8.29 and 8.77 billion parameters; a photo of 12 megapixels is 11 844 tokens of Qwen3-VL."""
    found = {}
    for name in ("qwen2.5-vl-7b", "qwen3-vl-8b"):
        with torch.device("meta"):
            model = getattr(transformers, f"{SHAPES[name].name}ForConditionalGeneration")(SHAPES[name].config())
        parameters = sum(value.numel() for value in model.parameters())
        found[name] = round(parameters / 1e9, 2), math.prod(grid_of(model, (4032, 3024))) // 4
    assert found == {"qwen2.5-vl-7b": (8.29, 15552), "qwen3-vl-8b": (8.77, 11844)}


def test_quartiles_lie_within_the_values():
    assert spread([1.0, 2.0]) == {"median": 1.5, "quartiles": [1.25, 1.75]}
    assert spread([3.0]) == {"median": 3.0, "quartiles": [3.0, 3.0]}


def test_tests_of_the_gpu_are_run(tmp_path: Path):
    (tmp_path / "test_two.py").write_text("import pytest\ndef test_a(): pytest.skip('no GPU')\ndef test_b(): pass\n")
    request = {"tests": [str(tmp_path / "test_two.py")], "flags": ["--noconftest"]}
    row = next(gpu_tests(request))
    assert row["status"] == 0 and row["said"].startswith("1 passed, 1 skipped") and "no GPU" in row["skipped"][0]
    with pytest.raises(RuntimeError, match=r"nowhere.py is not there: run this in a checkout"):
        next(gpu_tests({"tests": ["tests/nowhere.py"], "flags": []}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", GREEDY)
@torch.inference_mode()
def test_cuda_graph(method: str):
    choose = chooser(method, random_read(576, 64, "cuda"), 32)
    expected = choose()
    assert torch.equal(captured(choose)(), expected)
    assert all(row["same_choice"] for row in measure_choosers(576, 64, [16], "cuda", 2))


def test_the_script(quick_python: Path, tmp_path: Path):
    """With an interpreter of the user's own; the page stays as it is."""
    page = (ROOT / "docs" / "efficiency.md").read_bytes()
    command = ["bash", str(ROOT / "scripts" / "gpu_report.sh"), "--scaled", "--device", "cpu", "--sections", "graphs"]
    environment = {**os.environ, "PYTHON": str(quick_python / "bin/python"), "OUTPUT": str(tmp_path / "gpu.json")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "flash-attn" in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["graphs"]["state"] == "done"
    assert (ROOT / "docs" / "efficiency.md").read_bytes() == page

"""``visionzip benchmark tuning``: that what it compares is tuning, and its report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from llava.cli import main
from llava.measure import tuning
from llava.measure.meters.peak import peak_memory
from llava.measure.tuning import WAYS, add_tuning_arguments, build_model, run_twice, step_of
from llava.train.cache import drop_tower

TINY = ["--shape", "llava-1.5-tiny", "--device", "cpu", "--dtype", "float32", "--dominant", "9", "--contextual", "3"]
TINY += ["--text-tokens", "8", "--rounds", "2"]


@pytest.fixture
def args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_tuning_arguments(parser)
    return parser.parse_args(TINY)


def test_a_step_tunes_the_projector_only(args: argparse.Namespace):
    """In each way; with a cache, on a model that has no tower any more."""
    lengths = []
    for way in WAYS:
        model = build_model("llava-1.5-tiny", "cpu", torch.float32)
        if way.endswith("cached"):
            drop_tower(model)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        model.model.layers[0].mlp.register_forward_pre_hook(lambda mlp, inputs: lengths.append(inputs[0].shape[:2]))
        step = step_of(way, model, args)
        assert step() > step() > 0  # the loss falls on the one batch
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == {name for name in before if "mm_projector" in name}
    # Each layer is run twice in a step, as its activations are not kept.
    assert lengths == [(2, 72)] * 8 + [(2, 20)] * 8


def test_the_shapes():
    """The large one is LLaVA-1.5-7B; the one for CPUs keeps its visual tokens and its proportions."""
    shares = []
    for name in ("llava-1.5-7b", "llava-1.5-small"):
        with torch.device("meta"):
            model = build_model(name, "meta", torch.bfloat16)
        tower = model.get_vision_tower()
        assert tower.num_patches == 576
        sizes = [sum(value.numel() for value in part.parameters()) for part in (tower, model.model.layers)]
        shares.append(sizes[0] / sizes[1])
        if name == "llava-1.5-7b":
            assert sum(value.numel() for value in model.parameters()) == pytest.approx(7.06e9, rel=0.01)
    assert 0.5 < shares[1] / shares[0] < 2


@pytest.mark.usefixtures("quick_starts")
def test_the_memory_is_of_a_process_of_its_own(args: argparse.Namespace):
    names = ("shape", "device", "dtype", "batch_size", "text_tokens", "dominant", "contextual")
    request = {"way": "zipped, cached", **{name: getattr(args, name) for name in names}}
    assert 0 < peak_memory(run_twice, request)["memory_mib"] < 1000


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The memory is made up here, to start no processes."""
    made_up = {way: {"memory_mib": peak} for way, peak in zip(WAYS, (400.0, 380.0, 300.0, 280.0), strict=True)}
    monkeypatch.setattr(tuning, "peaks", lambda *args, **kwargs: made_up)
    output = tmp_path / "results/tuning.json"
    assert main(["benchmark", "tuning", *TINY, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert (report["torch"], report["shape"], report["batch_size"]) == (torch.__version__, "llava-1.5-tiny", 2)
    rows = {row["way"]: row for row in report["results"]}
    assert list(rows) == list(WAYS)
    assert [row["visual_tokens"] for row in rows.values()] == [64, 64, 12, 12]
    assert [row["memory_ratio"] for row in rows.values()] == [1, 0.95, 0.75, 0.7]
    assert rows["vanilla"]["time_ratio"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    assert "zipped, cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dominant", "0"], "dominant=0 is below 1"),
        (["--dominant", "60", "--contextual", "4"], "--dominant 60 --contextual 4 leaves nothing to compress"),
        (["--device", "cuda"], "this machine has no CUDA"),
    ],
)
def test_bad_input(flags: list[str], message: str, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(["benchmark", "tuning", *TINY, *flags]) == 2
    assert message in capsys.readouterr().err

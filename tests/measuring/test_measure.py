"""``visionzip benchmark prefill | generate | memory`` on tiny shapes."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.cli import main
from llava.measure.meters import peak
from llava.measure.meters.runner import PHASES, Runner, Way, bare_language_model, make_prompt
from llava.measure.meters.timing import Clock, time_interleaved
from llava.measure.models.shapes import SHAPES, build_model
from llava.methods import METHODS, per_tile
from visionzip.methods.visionzip import split

NEXT = ["--shape", "llava-next-tiny", "--tokens", "20", "--device", "cpu", "--rounds", "2"]


def test_ways_take_turns():
    """Each in every round, after a warm-up; one that returns its clock has its phases timed too."""
    order: list[str] = []

    def phased() -> Clock:
        clock = Clock("cpu")
        for phase in ("read", "choice"):
            time.sleep(0.01)
            clock.mark(phase)
        return clock

    measured = time_interleaved({"plain": time.time, "phased": phased}, "cpu", 3, "time", order.append)
    assert order == ["plain", "phased", "phased", "plain"] * 2
    assert len(measured["plain"].total) == 3 and measured["plain"].phases == {}
    assert list(measured["phased"].phases) == ["read", "choice"]
    for whole, phases in zip(measured["phased"].total, measured["phased"].sum_of("read", "choice"), strict=True):
        assert whole >= phases >= 0.02


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("llava-next-tiny", "cpu", torch.float32)


def test_prefill(tmp_path: Path, capsys):
    output, figure = tmp_path / "results" / "prefill.json", tmp_path / "figures" / "prefill.png"
    more = ["--batch-size", "1", "2", "--output", str(output), "--plot", str(figure)]
    assert main(["benchmark", "prefill", *NEXT, *more]) == 0
    report = json.loads(output.read_text())
    assert report["torch"] == torch.__version__ and report["date"]
    assert report["setting"]["shape"] == "llava-next-tiny" and report["setting"]["rounds"] == 2
    rows = {(row["batch"], row["way"]): row for row in report["results"]}
    ways = ["vanilla", "visionzip-20", "fastv-20", "sparsevlm-20"]
    assert list(rows) == [(batch, way) for batch in (1, 2) for way in ways]
    seen = {way: rows[1, way]["layer_tokens"] for way in ways}
    assert seen["vanilla"] == [380] * 4 and seen["visionzip-20"] == [80] * 4
    assert seen["fastv-20"] == [380, 80, 80, 80]
    assert seen["sparsevlm-20"][0] == 380 and max(seen["sparsevlm-20"][1:]) <= 80
    for (batch, _), row in rows.items():
        assert set(row["seconds"]) == {*PHASES, "first_token", "total"}
        assert all(found["median"] >= 0 for found in row["seconds"].values())
        assert row["kv_cache_mib"] * 2**20 == pytest.approx(2 * 4 * 64 * batch * sum(row["layer_tokens"]))
    vanilla, zipped = rows[1, "vanilla"], rows[1, "visionzip-20"]
    assert vanilla["speed_up"]["prefill"]["median"] == vanilla["of_bare"]["median"] == 1
    assert zipped["of_bare"]["median"] > 0 and rows[1, "fastv-20"]["of_bare"] is None
    assert zipped["flops"]["language_model"] < vanilla["flops"]["language_model"] / 4
    assert rows[2, "visionzip-20"]["flops"]["vision"] == 2 * zipped["flops"]["vision"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "sparsevlm-20" in printed and "language model" in printed


def test_generate_from_a_checkpoint(make_checkpoint, tmp_path: Path):
    output = tmp_path / "generate.json"
    command = [
        "benchmark",
        "generate",
        "--model-path",
        str(make_checkpoint()),
        "--tokens",
        "8",
        "--max-new-tokens",
        "3",
    ]
    more = ["--device", "cpu", "--method", "vanilla", "visionzip", "--rounds", "1", "--output", str(output)]
    assert main([*command, *more]) == 0
    vanilla, zipped = json.loads(output.read_text())["results"]
    assert (vanilla["visual_tokens"], zipped["visual_tokens"]) == (16, 8)
    assert vanilla["seconds"]["decode"]["median"] > 0 and vanilla["of_bare"] is None


@pytest.mark.usefixtures("quick_starts")
def test_memory(tmp_path: Path):
    output = tmp_path / "memory.json"
    flags = ["--method", "vanilla", "visionzip", "--output", str(output)]
    assert main(["benchmark", "memory", *NEXT[:-2], *flags]) == 0
    vanilla, zipped = json.loads(output.read_text())["results"]
    assert vanilla["memory_mib"] > vanilla["weights_mib"] > 0
    assert zipped["kv_cache_ratio"] == pytest.approx(80 / 380)


@pytest.mark.usefixtures("quick_starts")
def test_frames(tmp_path: Path, capsys):
    """Of a video: 65 tokens each with the CLS token, 17 zipped."""
    output, figure = tmp_path / "frames.json", tmp_path / "figures" / "frames.svg"
    flags = ["--shape", "video-llava-tiny", "--frames", "12", "4", "--rounds", "1", "--device", "cpu"]
    assert main(["benchmark", "frames", *flags, "--output", str(output), "--plot", str(figure)]) == 0
    rows = {row["way"]: row for row in json.loads(output.read_text())["results"]}
    assert {way: row["visual_tokens"] for way, row in rows.items()} == {
        "vanilla-4": 4 * 65,
        "visionzip-4": 4 * 17,
        "vanilla-12": 12 * 65,
        "visionzip-12": 12 * 17,
    }
    for row in rows.values():
        assert row["kv_cache_mib"] * 2**20 == pytest.approx(2 * 4 * 64 * 4 * (row["visual_tokens"] + 60))
        assert row["memory_mib"] > row["weights_mib"] > 0
        total = row["vision"]["median"] + row["prefill"]["median"]
        assert row["first_token"]["median"] == pytest.approx(total) and row["prefill"]["median"] > 0
    assert rows["vanilla-4"]["prefill_ratio"]["median"] == 1
    assert "<svg" in figure.read_text() and "visionzip-12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "frames.txt"], "give a file that ends in .png, .svg, .pdf"),
        (["--device", "cuda"], "this machine has no CUDA"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_input_about_frames(flags: list[str], message: str, capsys):
    assert main(["benchmark", "frames", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "21"], "an image has 5 tiles, so give a multiple of 5"),
        (["--tokens", "320"], "llava-next-tiny has 320 visual tokens per image; give fewer"),
        (["--plot", "latency.txt"], "give a file that ends in .png, .svg, .pdf"),
        (["--model-path", "somewhere"], "--model-path somewhere: give one of them"),
        (["--shape", "video-llava-tiny", "--transformers"], "only images have shapes of transformers' classes"),
        (["--method", "vanilla", "--compile"], "have visionzip among --method"),
    ],
)
def test_bad_input(flags: list[str], message: str, capsys):
    assert main(["benchmark", "prefill", *NEXT, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("quick_starts")
def test_a_process_that_refuses_says_why(capsys):
    """Memory is measured in processes of their own: what is wrong there is one line here too."""
    flags = ["--shape", "llava-next-tiny", "--tokens", "5", "--method", "sparsevlm", "--device", "cpu"]
    assert main(["benchmark", "memory", *flags]) == 2
    message = "memory of sparsevlm-5: SparseVLM cannot make 1 of 64 visual tokens: give 3 to 64"
    assert capsys.readouterr().err.splitlines()[-1] == f"visionzip benchmark memory: {message}"


def test_a_budget_that_leaves_nothing_to_compress(make_checkpoint, capsys):
    flags = ["--model-path", str(make_checkpoint()), "--tokens", "16", "--method", "fastv", "--device", "cpu"]
    assert main(["benchmark", "prefill", *flags]) == 2
    assert "--tokens 16: this model has 16 visual tokens per image" in capsys.readouterr().err


def test_checkpoint_without_a_budget(capsys):
    assert main(["benchmark", "memory", "--model-path", "somewhere", "--device", "cpu"]) == 2
    assert "--model-path needs --tokens too" in capsys.readouterr().err


def test_shapes():
    assert {name: SHAPES[name].visual_tokens for name in ("llava-1.5-13b", "llava-next-7b", "llava-next-mini")} == {
        "llava-1.5-13b": 576,
        "llava-next-7b": 2880,
        "llava-next-mini": 2880,
    }
    assert split(per_tile(160, 5)) == (27, 5) and split(64) == (54, 10)
    with torch.device("meta"):  # the true size, without its weights
        seven = build_model("llava-next-7b", "meta", torch.bfloat16)
    assert sum(parameter.numel() for parameter in seven.parameters()) == pytest.approx(7.06e9, rel=0.01)


def test_methods_come_off_again(model):
    """After any of them the model answers as before, and no class has changed."""
    runner = Runner(model, make_prompt(model, 12, 1), new_tokens=2)
    embeds = torch.randn(1, 9, 64)
    before = model(inputs_embeds=embeds).logits
    for method in set(METHODS) - {"pool", "resize", "fastv-average", "sparsevlm-average"}:  # not of tiles; of 4 layers
        runner.attach(Way(method, None if method == "vanilla" else 20))
        runner.once()
    runner.detach()
    assert torch.equal(model(inputs_embeds=embeds).logits, before)
    assert "forward" not in vars(model.get_model())


def test_a_compiled_prefill_is_one_graph(model, monkeypatch: pytest.MonkeyPatch):
    """``torch.compile`` takes the zipped prefill whole; its code generator is left out here, which takes a minute."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    runner = Runner(model, make_prompt(model, 12, 1), new_tokens=1)
    prompt, logits = runner.prompt, []
    for compiled in (False, True):
        runner.attach(Way("visionzip", 20, compiled))
        with torch.inference_mode():
            out = model(prompt.ids, images=prompt.images, image_sizes=[prompt.size])
        logits.append(out.logits)
    runner.detach()
    assert torch.equal(logits[1], logits[0])
    assert len(graphs) == 1


def test_the_bare_language_model_is_the_same(model):
    embeds = torch.randn(1, 9, 64)
    bare = bare_language_model(model)
    assert type(bare).__name__ == "LlamaForCausalLM"
    assert torch.equal(bare(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)
    assert (
        bare.lm_head.weight is model.lm_head.weight or bare.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    )


def test_work_without_memory_has_a_peak_of_nothing(monkeypatch: pytest.MonkeyPatch):
    """Linux counts a process's pages per core and adds up now and then: a later reading may be a little smaller."""
    readings = iter([600.0, 599.75])
    monkeypatch.setattr(peak, "_memory_peak", lambda: next(readings))
    assert peak.peak_of(lambda: "done", "cpu") == ("done", 0.0)

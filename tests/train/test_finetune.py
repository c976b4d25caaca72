"""The training scripts themselves, on tiny models, with two processes on the CPU: DeepSpeed's ZeRO, kill and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import record_of, steps_of, turns, wait_for_the_end
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints import LANGUAGE_MODEL, NEXT, TOWER_PREFIX, picture, write_tokenizer
from llava.model.builder import load_pretrained_model
from llava.train.data import Collator, InstructionData, read_records
from visionzip import VisionZipConfig

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
STEPS, HALF = 12, 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training needs beside a LLaVA: ``data.json``, ``images`` and a language model in ``base``."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    records = []
    for index in range(28):
        picture(index).save(folder / "images" / f"{index}.png")
        said = turns("<image>\nWhat is it?", "the rings")
        records.append({"id": f"seen-{index}", "image": f"{index}.png", "conversations": said})
    for index in range(4):
        records.insert(8 * index, {"id": f"read-{index}", "conversations": turns("What is left?", "the rest")})
    (folder / "data.json").write_text(json.dumps(records))
    own = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith(("mm_", "image_"))}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**own)).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    return folder


@pytest.fixture(scope="module")
def script(world: Path, make_checkpoint: Callable[..., Path], quick_trainer: Path) -> Callable[..., subprocess.Popen]:
    """Starts ``bash scripts/NAME.sh FLAG…``; variables are added to those that make it small."""

    def start(name: str, out: Path, *flags: str, **variables: Any) -> subprocess.Popen:
        own = {
            "MODEL_PATH": make_checkpoint(),
            "DATA_PATH": world / "data.json",
            "IMAGE_FOLDER": world / "images",
            "OUTPUT": out,
            "DOMINANT": 3,
            "CONTEXTUAL": 2,
            "DATA_FRACTION": 0.5,
            "DEVICE": "cpu",
            "PROCESSES": 2,
            "GLOBAL_BATCH": 4,
            "MICRO_BATCH": 1,
            "LEARNING_RATE": 0.01,
            "VIRTUAL_ENV": quick_trainer,
            "HF_HUB_OFFLINE": 1,
        }
        environment = {**os.environ, **{key: str(value) for key, value in {**own, **variables}.items()}}
        small = ("--dataloader_num_workers", "0", "--warmup_steps", "0", *flags)
        command = ["bash", str(ROOT / f"scripts/{name}.sh"), *small]
        log = out.with_suffix(".log").open("a")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd="/")

    return start


def finish(process: subprocess.Popen, out: Path) -> Path:
    """Wait until a script has succeeded; its log, if not."""
    assert process.wait(timeout=300) == 0, out.with_suffix(".log").read_text()[-5000:]
    return out


LONG = ("--max_steps", str(STEPS), "--save_steps", str(HALF), "--save_total_limit", "2")
IN_ORDER = ("--group_by_modality_length", "False", "--train_sampling_strategy", "sequential")


@pytest.fixture(scope="module")
def zero3(script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "zero3"
    return finish(script("finetune_visionzip", out, *LONG, *IN_ORDER, ZERO="zero3"), out)


def test_the_script_tunes_the_projector_only(zero3: Path, world: Path, make_checkpoint):
    """Under ZeRO-3: the loss falls; everything else of the model is the base's; a record says what was done."""
    model = load_pretrained_model(str(zero3), str(make_checkpoint()), device="cpu")[1]
    assert model.get_vision_tower().visionzip == VisionZipConfig(dominant=3, contextual=2)
    before = load_file(make_checkpoint() / "model.safetensors")
    tuned = load_file(zero3 / "mm_projector.safetensors")
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == tuned.keys() == {key for key in before if "mm_projector" in key}
    assert all(torch.equal(value, torch.load(zero3 / "mm_projector.bin")[key]) for key, value in tuned.items())
    # What DeepSpeed has optimized.
    states = torch.load(next(zero3.glob("checkpoint-12/*/*model_states.pt")), weights_only=False)
    assert {name for group in states["param_shapes"] for name in group} == tuned.keys()

    losses = [loss for _, loss, _, _ in steps_of(zero3)]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.4
    record = record_of(zero3)
    sample = read_records(str(world / "data.json"), str(world / "images"), "v1", fraction=0.5).kept
    assert record["records"] == [one["id"] for one in sample]
    assert record["batch_per_step"] == 4
    assert {"torch", "transformers", "deepspeed", "visionzip"} <= record["versions"].keys()
    logged = [entry for entry in record["losses"] if "loss" in entry]
    assert {entry["visual_tokens_per_image"] for entry in logged} == {5}
    assert all(entry["samples_per_second"] > 0 and entry["peak_memory_gib"] > 0 for entry in logged)
    assert record["left_out"] == []


def test_the_saved_projector_gives_the_logits_of_training(zero3: Path, world: Path, make_checkpoint):
    """Loaded over the base, the projector of step 6 has the loss that training had in step 7, where nothing had moved
    since: so nothing but the projector had moved before."""
    checkpoint = zero3 / f"checkpoint-{HALF}"
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), str(make_checkpoint()), device="cpu")
    kept = read_records(str(world / "data.json"), str(world / "images"), "v1", fraction=0.5).kept
    data = InstructionData(kept, str(world / "images"), tokenizer, "v1", processor, model.config)
    first = HALF * 4 % len(data)
    batch = Collator(tokenizer, 2048)([data[first + place] for place in range(4)])
    assert batch.pop("records") == [data[first + place]["record"] for place in range(4)]
    with torch.inference_mode():
        loss = model(**batch).loss.item()
    assert loss == pytest.approx(steps_of(zero3)[HALF][1], rel=1e-5)


def test_a_run_that_is_killed_goes_on(zero3: Path, script, tmp_path: Path):
    """Under ZeRO-2, killed without warning: it ends as the run under ZeRO-3, which was not interrupted."""
    out = tmp_path / "zero2"
    process = script("finetune_visionzip", out, *LONG, *IN_ORDER, ZERO="zero2")
    deadline = time.monotonic() + 240
    while not (out / f"checkpoint-{HALF}/trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, out.with_suffix(".log").read_text()[-5000:]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "run.json").exists()
    wait_for_the_end(out)
    written = (out / f"checkpoint-{HALF}/mm_projector.bin").stat().st_mtime_ns
    shutil.copytree(out / f"checkpoint-{HALF}", out / f"checkpoint-{STEPS}", dirs_exist_ok=True)
    os.truncate(next((out / f"checkpoint-{STEPS}").glob("*/*optim_states.pt")), 1000)  # as if killed in the middle
    finish(script("finetune_visionzip", out, *LONG, *IN_ORDER, ZERO="zero2"), out)
    assert (out / f"checkpoint-{HALF}/mm_projector.bin").stat().st_mtime_ns == written
    passed_over = f"checkpoint-{STEPS} is not whole and is passed over: "
    assert out.with_suffix(".log").read_text().count(passed_over) == 1  # not by each process
    for found, expected in zip(steps_of(out), steps_of(zero3), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_zero3_goes_on_exactly(zero3: Path, script, tmp_path: Path):
    out = tmp_path / "again"
    out.mkdir()
    shutil.copytree(zero3 / f"checkpoint-{HALF}", out / f"checkpoint-{HALF}")
    finish(script("finetune_visionzip", out, *LONG, *IN_ORDER, ZERO="zero3"), out)
    assert steps_of(out) == steps_of(zero3)
    assert (out / "mm_projector.bin").read_bytes() == (zero3 / "mm_projector.bin").read_bytes()


def test_more_processes_than_samples(script, tmp_path: Path):
    out = tmp_path / "few"
    assert script("finetune_visionzip", out, DATA_FRACTION=0.01).wait(timeout=200) == 1
    log = out.with_suffix(".log").read_text()
    message = "error: llava.train.train: 2 processes, but 1 records to train on: start fewer, or give more"
    assert log.splitlines()[-1] == message


def test_a_loss_that_is_not_finite(script, tmp_path: Path):
    """Under ZeRO-2 with two processes, which DeepSpeed steps itself."""
    out = tmp_path / "wild"
    flags = ("--max_steps", "5", "--save_steps", "1", *IN_ORDER)
    assert script("finetune_visionzip", out, *flags, ZERO="zero2", LEARNING_RATE=1e20).wait(timeout=300) == 1
    last = out.with_suffix(".log").read_text().splitlines()[-1]
    assert last.startswith("error: llava.train.train: the loss of step 2 is not finite (records '")
    assert "; the loss of step 3 is not finite (records '" in last and last.endswith("wild/checkpoint-1")
    assert [path.name for path in out.iterdir()] == ["checkpoint-1"]


def test_a_damaged_image_is_named_last(script, world: Path, tmp_path: Path):
    """Although a process that reads data has met it, and a progress bar stands in its line."""
    images = shutil.copytree(world / "images", tmp_path / "images")
    for path in images.iterdir():
        os.truncate(path, 3000)
    out = tmp_path / "torn"
    alone = {"PROCESSES": 1, "ZERO": "none", "IMAGE_FOLDER": images}
    assert script("finetune_visionzip", out, "--dataloader_num_workers", "1", **alone).wait(timeout=200) == 1
    lines = out.with_suffix(".log").read_text().splitlines()
    assert lines[-1].startswith("error: llava.train.train: record 'seen-")
    assert "png is not a readable image" in lines[-1]
    assert lines[-1].removeprefix("error: ") in lines  # not behind the bar


def test_batches_that_cannot_be_made(script, tmp_path: Path):
    for variables, message in (
        ({"GLOBAL_BATCH": 5}, "GLOBAL_BATCH=5 cannot be shared out to 2 processes"),
        ({"MICRO_BATCH": 3}, "MICRO_BATCH=3 does not divide the 2 samples of a process"),
        ({"ZERO": "zero9"}, "ZERO=zero9: there is no scripts/zero9.json"),
        ({"NNODES": 2}, "NNODES=2 needs NODE_RANK and MASTER_ADDR"),
        ({"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere is no file"),
        ({"DEVICE": "tpu"}, "DEVICE=tpu is neither cuda nor cpu"),
        ({"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": -1}, "DEVICE=cuda, but there is no GPU to be seen"),
        ({"GLOBAL_BATCH": 0}, "GLOBAL_BATCH=0 is not a whole number of at least 1"),
        ({"PROCESSES": "two"}, "PROCESSES=two is not a whole number of at least 1"),
        ({"DATA_PATH": "/nowhere.json", "MODEL_PATH": "on/the-hub"}, "DATA_PATH=/nowhere.json: there is no such file"),
    ):
        out = tmp_path / "bad"
        assert script("finetune_visionzip", out, **variables).wait(timeout=60) == 1
        assert message in out.with_suffix(".log").read_text().splitlines()[-1]
        assert not out.exists()


def test_the_other_scripts(script, world: Path, make_checkpoint, tmp_path: Path):
    """LLaVA's two stages from a language model and a tower, LoRA, and LLaVA-NeXT: each result loads."""
    short = ("--max_steps", "1", "--save_strategy", "no")
    alone = {"PROCESSES": 1, "ZERO": "none"}

    def run(name: str, *flags: str, **variables: Any) -> Path:
        return finish(script(name, tmp_path / name, *short, *flags, **alone, **variables), tmp_path / name)

    def two_stages() -> tuple[Path, Path]:
        new = {"MODEL_PATH": world / "base", "VISION_TOWER": make_checkpoint().with_name("llava-v1.5-tiny-tower")}
        captions = {"DATA_PATH": world / "data.json"}
        pretrained = run("pretrain", **new, **captions)
        return pretrained, run("finetune", **new, PROJECTOR=pretrained / "mm_projector.bin")

    def on_llava() -> tuple[Path, Path]:
        return run("finetune_lora", "--lora_r", "4"), run("finetune_visionzip_next", MODEL_PATH=make_checkpoint(**NEXT))

    with ThreadPoolExecutor() as pool:
        (pretrained, finetuned), (lora, tiles) = (job.result() for job in map(pool.submit, (two_stages, on_llava)))
    for folder, base in (
        (pretrained, world / "base"),
        (finetuned, None),
        (lora, make_checkpoint()),
        (tiles, make_checkpoint(**NEXT)),
    ):
        model = load_pretrained_model(str(folder), base and str(base), device="cpu")[1]
        assert model.get_vision_tower().visionzip == VisionZipConfig(dominant=3, contextual=2), folder
    before = load_file(make_checkpoint() / "model.safetensors")
    model = load_pretrained_model(str(lora), str(make_checkpoint()), device="cpu")[1]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {
        key for key in before if ("mm_projector" in key or "_proj.weight" in key) and not key.startswith(TOWER_PREFIX)
    }
    logged = record_of(tiles)["losses"][0]
    assert logged["visual_tokens_per_image"] == 25  # of 5 tiles

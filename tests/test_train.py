"""The ways to train: LLaVA's two stages, the projector, an adapter; what they leave, and how they go on."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training import TRAINER, assert_same, command, record_of, steps_of, turns
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
)

from checkpoints import CLIP, LANGUAGE_MODEL, NEXT, TOWER_PREFIX, picture, write_tower
from llava.mm_utils import get_anyres_image_grid_shape, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.tokenizer import load_tokenizer
from llava.train import train as llava_training
from visionzip import VisionZipConfig


@pytest.fixture(scope="module")
def llava(world: Path) -> Callable[..., int]:
    """``python -m llava.train.train`` on the world's data, for four steps unless told otherwise."""

    def run(out: Path, **flags: Any) -> int:
        own = {"output_dir": out, "data_path": world / "data.json", "image_folder": world / "images", "max_steps": 4}
        return command(llava_training.main, **{**TRAINER, **own, **flags})

    return run


@pytest.fixture(scope="module")
def projector(world: Path, llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage's folder."""
    out = tmp_path_factory.mktemp("projector")
    new = {"model_name_or_path": world / "base", "vision_tower": world / "tower"}
    assert llava(out, **new, tune_mm_mlp_adapter=True, version="plain", data_path=captions(world), save_steps=2) == 0
    return out


def captions(world: Path) -> Path:
    path = world / "captions.json"
    records = json.loads((world / "data.json").read_text())[:8]
    path.write_text(json.dumps([{**record, "conversations": record["conversations"][:2]} for record in records]))
    return path


@pytest.fixture(scope="module")
def second_stage(world: Path, projector: Path) -> dict[str, Any]:
    """Its arguments, beside the folder."""
    return {
        "model_name_or_path": world / "base",
        "vision_tower": world / "tower",
        "pretrain_mm_mlp_adapter": projector / "mm_projector.safetensors",
        "mm_projector_lr": 1e-3,
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def tuned(llava, second_stage: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second stage's folder."""
    out = tmp_path_factory.mktemp("tuned")
    assert llava(out, **second_stage) == 0
    return out


def weights_by_part(file: Path) -> dict[str, dict[str, Tensor]]:
    """A model's weights: of its ``projector``, its ``tower`` and its ``language`` model."""
    parts: dict[str, dict[str, Tensor]] = {"projector": {}, "tower": {}, "language": {}}
    for key, value in load_file(file).items():
        part = "projector" if "mm_projector" in key else "tower" if key.startswith(TOWER_PREFIX) else "language"
        parts[part][key.removeprefix(TOWER_PREFIX)] = value
    return parts


def furthest(weights: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, float]:
    """How far each weight has moved."""
    return {key: (value - before[key]).abs().max().item() for key, value in weights.items()}


def projector_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "mm_projector.safetensors")


def test_the_first_stage_learns_the_projector_only(world: Path, llava, tmp_path: Path, monkeypatch):
    """Everything else is bit-identical to what it was, in the model itself; only the projector is written."""
    models = []
    build = llava_training.build_model
    monkeypatch.setattr(llava_training, "build_model", lambda *args: models.append(parts := build(*args)) or parts)
    new = {"model_name_or_path": world / "base", "vision_tower": world / "tower", "gradient_checkpointing": True}
    assert llava(tmp_path, **new, tune_mm_mlp_adapter=True, save_steps=2) == 0
    weights = models[0][1].state_dict()
    found = {"projector": {}, "tower": {}, "language": {}}
    for key, value in weights.items():
        part = "projector" if "mm_projector" in key else "tower" if key.startswith(TOWER_PREFIX) else "language"
        found[part][key.removeprefix(TOWER_PREFIX)] = value
    assert_same(found["language"], load_file(world / "base/model.safetensors"))
    assert_same(found["tower"], load_file(world / "tower/model.safetensors"))
    assert_same(found["projector"], projector_of(tmp_path))
    assert min(furthest(projector_of(tmp_path / "checkpoint-4"), projector_of(tmp_path / "checkpoint-2")).values()) > 0
    assert_same(torch.load(tmp_path / "mm_projector.bin"), projector_of(tmp_path))
    assert not list(tmp_path.rglob("model.safetensors"))


def test_the_first_stages_folder_is_loaded_over_its_language_model(world: Path, projector: Path):
    tokenizer, model, image_processor, _ = load_pretrained_model(str(projector), str(world / "base"), device="cpu")
    assert (projector / "preprocessor_config.json").is_file()  # needed where the tower is in the base's own folder
    expected = projector_of(projector / "checkpoint-4")  # a checkpoint is loaded in the same way
    assert_same({key: value for key, value in model.state_dict().items() if "mm_projector" in key}, expected)
    images = process_images([picture(0)], image_processor, model.config)
    ids = tokenizer_image_token("<image>", tokenizer, return_tensors="pt")[None]
    assert model.generate(ids, images=images, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)
    assert model.config.use_cache
    assert model.config.tokenizer_model_max_length == 2048


def test_the_second_stage_learns_projector_and_language_model(world: Path, projector: Path, tuned: Path):
    """Each at its own rate; the tower stays as it is."""
    weights = weights_by_part(tuned / "model.safetensors")
    assert_same(weights["tower"], load_file(world / "tower/model.safetensors"))
    language = furthest(weights["language"], load_file(world / "base/model.safetensors")).values()
    own = furthest(weights["projector"], load_file(projector / "mm_projector.safetensors")).values()
    assert 0 < min(own) <= max(own) < 5e-3 < min(language)  # four steps of at most 1e-3 and 1e-2


def test_the_second_stages_folder_is_a_whole_checkpoint(tuned: Path):
    model = load_pretrained_model(str(tuned), device="cpu")[1]
    assert_same(dict(model.state_dict()), load_file(tuned / "model.safetensors"))
    assert model.get_vision_tower().visionzip is None


def test_a_run_leaves_a_record(tuned: Path):
    """Arguments, versions and losses, and a picture of them."""
    record = record_of(tuned)
    assert record["training"]["mm_projector_lr"] == 1e-3
    assert record["model"]["version"] == "v1"
    assert record["data"]["data_fraction"] == 1
    assert (record["batch_per_step"], record["records"]) == (2, 10)
    assert record["versions"]["torch"] == torch.__version__
    losses = [entry["loss"] for entry in record["losses"] if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert Image.open(tuned / "losses.png").width > 100


def test_a_stopped_run_ends_as_if_it_had_not_been(llava, second_stage: dict[str, Any], tuned: Path, tmp_path: Path):
    """Stopped after step 2 of 4, it has left that checkpoint; the same command goes on there."""
    checkpoint = shutil.copytree(tuned / "checkpoint-2", tmp_path / "run/checkpoint-2")
    written = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert llava(tmp_path / "run", **second_stage) == 0
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == written  # not done again
    assert_same(load_file(tmp_path / "run/model.safetensors"), load_file(tuned / "model.safetensors"))
    assert steps_of(tmp_path / "run") == steps_of(tuned)


def test_a_run_of_other_arguments_does_not_go_on(
    llava, second_stage: dict[str, Any], tuned: Path, tmp_path: Path, capsys
):
    """It would have one run's weights and the other's record; a folder that has moved, or more steps, are the same."""
    shutil.copytree(tuned, tmp_path / "run")
    result = (tmp_path / "run/run.json").read_bytes()
    for other, named in (
        ({"learning_rate": 0.5}, "learning_rate=0.5 (there: 0.01)"),
        ({"visionzip_dominant": 3, "visionzip_contextual": 2}, "visionzip_dominant=3 (there: None)"),
        ({"data_fraction": 0.5, "data_seed": 7}, "data_fraction=0.5 (there: 1.0)"),
    ):
        assert llava(tmp_path / "run", **{**second_stage, **other}) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert named in message and "give another output_dir" in message
        assert (tmp_path / "run/run.json").read_bytes() == result
    base = shutil.copytree(second_stage["model_name_or_path"], tmp_path / "moved/base")
    assert llava(tmp_path / "run", **{**second_stage, "model_name_or_path": base}, max_steps=6) == 0
    assert len(steps_of(tmp_path / "run")) == 6


def test_turns_that_do_not_see_each_other(world: Path, llava, tuned: Path, tmp_path: Path, capsys):
    """The loss of packed turns is that of the same turns in records of their own, with an image or without."""
    records = json.loads((world / "data.json").read_text())
    records = [records[0], records[8], next(record for record in records if "image" not in record)]
    for record in records:
        record["conversations"] = [
            *record["conversations"][:2],
            *turns("And how many?", "3 of them", "Why?", "Who knows."),
        ]
    single = []
    for record in records:
        for question, answer in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
            text = question["value"].replace("<image>", "").strip()
            asked = {"from": "human", "value": f"<image>\n{text}" if "image" in record else text}
            single.append({**record, "conversations": [asked, answer]})
    losses = []
    for number, (data, apart) in enumerate(((records, True), (single, False))):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(data))
        flags = {"max_steps": 1, "per_device_train_batch_size": len(data), "save_strategy": "no", "turns_apart": apart}
        assert llava(tmp_path / f"run{number}", model_name_or_path=tuned, data_path=path, **flags) == 0
        losses.append(record_of(tmp_path / f"run{number}")["losses"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert llava(tmp_path / "text", model_name_or_path=world / "base", turns_apart=True) == 2
    assert "turns_apart needs a vision tower" in capsys.readouterr().err


def test_training_with_visionzip(world: Path, llava, tuned: Path, dataset, tmp_path: Path):
    """As the paper's efficient tuning: the projector of a LLaVA, with few visual tokens, on a share of its data."""
    zipped = {"visionzip_dominant": 3, "visionzip_contextual": 2, "tune_mm_mlp_adapter": True}
    share = {"data_fraction": 0.5, "data_seed": 7}
    assert llava(tmp_path, model_name_or_path=tuned, **zipped, **share, max_steps=2, save_strategy="no") == 0
    _, model, image_processor, _ = load_pretrained_model(str(tmp_path), str(tuned), device="cpu")
    assert model.get_vision_tower().visionzip == VisionZipConfig(dominant=3, contextual=2)
    assert model.encode_images(process_images([picture(0)], image_processor, model.config)).shape == (1, 5, 32)
    before, after = load_file(tuned / "model.safetensors"), load_file(tmp_path / "mm_projector.safetensors")
    assert min(furthest(after, before).values()) > 0

    record = record_of(tmp_path)
    assert record["training"]["data_seed"] == 7
    assert record["records"] == [sampled["id"] for sampled in dataset(fraction=0.5, seed=7).records]
    assert record["records"] != [sampled["id"] for sampled in dataset(fraction=0.5).records]


@pytest.fixture(scope="module")
def on_llava(llava, world: Path, make_checkpoint: Callable[..., Path]) -> Callable[..., int]:
    """``llava``, on a whole LLaVA of its own."""
    return lambda out, **flags: llava(out, model_name_or_path=make_checkpoint(), **flags)


LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-3}


def test_an_adapter_and_the_projector(on_llava, make_checkpoint, tmp_path: Path):
    """LoRA: what is learnt is in LLaVA's files, loads over the base, and goes on when it is stopped."""
    flags = {**LORA, "save_steps": 2, "visionzip_dominant": 3, "visionzip_contextual": 2}
    assert on_llava(tmp_path / "whole", **flags) == 0
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "stopped/checkpoint-2")
    assert on_llava(tmp_path / "stopped", **flags) == 0
    assert steps_of(tmp_path / "stopped") == steps_of(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.rglob("model.safetensors"))

    beside = torch.load(tmp_path / "whole/non_lora_trainables.bin")
    assert all(key.startswith("base_model.model.model.mm_projector.") for key in beside)
    before = load_file(make_checkpoint() / "model.safetensors")
    model = load_pretrained_model(str(tmp_path / "whole"), str(make_checkpoint()), device="cpu")[1]
    assert model.get_vision_tower().visionzip == VisionZipConfig(dominant=3, contextual=2)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {
        key
        for key in before
        if not key.startswith(TOWER_PREFIX) and ("mm_projector" in key or "self_attn" in key or "mlp" in key)
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_quantised_model(bits: int, on_llava, make_checkpoint, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    assert on_llava(tmp_path, **LORA, bits=bits, max_steps=2, bf16=True, save_strategy="no") == 0
    load_pretrained_model(str(tmp_path), str(make_checkpoint()), device="cpu")


def test_gradients_reach_the_projector_through_checkpoints(on_llava, tmp_path: Path):
    """Less memory, the same steps."""
    flags = {"tune_mm_mlp_adapter": True, "max_steps": 2, "save_strategy": "no"}
    for checkpointing in (False, True):
        assert on_llava(tmp_path / str(checkpointing), **flags, activation_checkpointing=checkpointing) == 0
    found, expected = (steps_of(tmp_path / str(checkpointing)) for checkpointing in (True, False))
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in zip(found, expected, strict=True))
    assert expected[1][3] > 0


def test_tiles_of_llava_next(world: Path, llava, make_checkpoint, tmp_path: Path):
    """Trained as they are asked for, with a text-only sample in the batch."""
    tiles = make_checkpoint(**NEXT)
    flags = {"tune_mm_mlp_adapter": True, "visionzip_dominant": 3, "visionzip_contextual": 2, "save_strategy": "no"}
    batch = {"max_steps": 1, "per_device_train_batch_size": 10}
    assert llava(tmp_path / "all", model_name_or_path=tiles, **flags, **batch) == 0
    logged = record_of(tmp_path / "all")["losses"][0]
    grid = get_anyres_image_grid_shape((90, 60), LANGUAGE_MODEL["image_grid_pinpoints"], 56)
    assert logged["visual_tokens_per_image"] == 5 * (1 + grid[0] * grid[1])
    padded = {**batch, "image_aspect_ratio": "pad"}
    assert llava(tmp_path / "padded", model_name_or_path=tiles, **flags, **padded) == 0
    assert record_of(tmp_path / "padded")["losses"][0]["visual_tokens_per_image"] == 5 + 1  # and the newline
    config = json.loads((tmp_path / "padded/config.json").read_text())
    assert config["image_aspect_ratio"] == "pad"


def test_what_is_too_long_is_cut_and_counted(on_llava, tmp_path: Path):
    """At the whole prompt's length, visual tokens included; also with what the record shows as the longest."""
    flags = {"tune_mm_mlp_adapter": True, "max_steps": 2, "per_device_train_batch_size": 10, "save_strategy": "no"}
    assert on_llava(tmp_path, **flags, model_max_length=80) == 0
    assert [entry["cut_samples"] for entry in record_of(tmp_path)["losses"][:2]] == [8, 16]  # text only is shorter
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer_model_max_length"] == 80


def test_records_that_are_skipped_are_counted(world: Path, on_llava, tmp_path: Path):
    records = json.loads((world / "data.json").read_text())[:4]
    (world / "images/torn.png").write_bytes((world / "images/1.png").read_bytes()[:3000])
    records += [{**records[0], "id": ["torn"], "image": "torn.png"}, {**records[0], "id": "lost", "image": "lost.png"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = {"data_path": tmp_path / "data.json", "tune_mm_mlp_adapter": True, "num_train_epochs": 2, "max_steps": -1}
    assert on_llava(tmp_path / "run", **flags, skip_bad_samples=True, group_by_modality_length=True) == 0
    record = record_of(tmp_path / "run")
    assert record["records"] == 5
    assert [bad["id"] for bad in record["left_out"]] == ["lost", ["torn"]]
    assert len(steps_of(tmp_path / "run")) == 6  # two epochs of five records, two at a time


def test_wandb_without_a_network(on_llava, tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    assert on_llava(tmp_path / "run", tune_mm_mlp_adapter=True, max_steps=1, report_to="wandb", save_strategy="no") == 0
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_full_disk(on_llava, tmp_path: Path, monkeypatch, capsys):
    """Is seen before training; where it fills up later, what is there stays whole and the run can go on."""
    flags = {"tune_mm_mlp_adapter": True, "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        assert on_llava(tmp_path / "run", **flags) == 2
    assert "GiB free, but this run's checkpoints and results will take about" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

    assert on_llava(tmp_path / "run", **flags) == 0
    result = (tmp_path / "run/mm_projector.bin").read_bytes()
    for lost, message in (("checkpoint-4", "cannot write the checkpoint of step 4"), ("", "cannot write ")):
        if lost:
            shutil.rmtree(tmp_path / "run" / lost)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # of any file, as if the disk ended there
        try:
            assert on_llava(tmp_path / "run", **flags) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert (tmp_path / "run/mm_projector.bin").read_bytes() == result
        assert not list(tmp_path.rglob("*.partial"))
        assert on_llava(tmp_path / "run", **flags) == 0
        assert (tmp_path / "run/mm_projector.bin").read_bytes() == result


def test_room_that_a_stopped_run_has_taken(on_llava, tmp_path: Path, monkeypatch):
    """A disk that the whole run just fits on is large enough to go on, with a checkpoint on it already."""
    projector = 2 * (32 * 32 + 32)
    capacity = 8 * projector + 2 * (8 + 12) * projector  # the result in two files, two checkpoints with AdamW's state

    def usage(path: Path) -> SimpleNamespace:
        taken = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
        return SimpleNamespace(free=capacity - taken)

    flags = {"tune_mm_mlp_adapter": True, "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", usage)
        assert on_llava(tmp_path / "whole", **flags) == 0
        shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "run/checkpoint-2")
        assert on_llava(tmp_path / "run", **flags) == 0


def test_a_llava_goes_on_with_another_tower(llava, tuned: Path, tmp_path: Path):
    """At another resolution, as the embedded model does: projector and language model stay."""
    larger = {**CLIP, "image_size": 84}
    encoder = CLIPVisionModel(CLIPVisionConfig(**larger))
    write_tower(tmp_path / "larger", larger, {f"vision_model.{k}": v for k, v in encoder.state_dict().items()})
    new = {"model_name_or_path": tuned, "vision_tower": tmp_path / "larger"}
    assert llava(tmp_path / "out", **new, learning_rate=0.0, max_steps=1, save_strategy="no") == 0
    weights, before = weights_by_part(tmp_path / "out/model.safetensors"), weights_by_part(tuned / "model.safetensors")
    assert_same(weights["tower"], load_file(tmp_path / "larger/model.safetensors"))
    assert_same({**weights["projector"], **weights["language"]}, {**before["projector"], **before["language"]})
    _, model, image_processor, _ = load_pretrained_model(str(tmp_path / "out"), device="cpu")
    assert model.encode_images(process_images([picture(0)], image_processor, model.config)).shape == (1, 36, 32)


def test_a_whitened_projector_hides_nothing(world: Path):
    """Its hidden layer sees all directions of the features alike, and tokens have the size of embeddings."""
    model = llava_training.build_model(
        llava_training.ModelArguments(model_name_or_path=str(world / "base"), vision_tower=str(world / "tower")),
        llava_training.DataArguments(data_path=""),
    )[1]
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    images = torch.randn(64, 3, 56, 56)
    features = tower(images).flatten(0, 1)
    before = projector[0](features)
    llava_training.whiten_projector(model, images)
    hidden = projector[0](features)
    assert hidden.mean(dim=0).abs().max() < 1e-3
    variances, earlier = (torch.linalg.eigvalsh(values.detach().T.cov()) for values in (hidden, before))
    assert variances[-1] < 1.1
    assert variances.median() / variances[-1] > 3 * earlier.median() / earlier[-1]
    embedded = model.get_input_embeddings().weight.std()
    assert 0.5 * embedded < model.encode_images(images).std() < 2 * embedded


def test_training_a_language_model_alone(world: Path, llava, tmp_path: Path):
    assert llava(tmp_path, model_name_or_path=world / "base", max_steps=2, save_strategy="no") == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(trained) is LlamaForCausalLM
    before = load_file(world / "base/model.safetensors")
    assert min(furthest(dict(trained.state_dict()), before).values()) > 0
    assert load_tokenizer(tmp_path)("Where?").input_ids == load_tokenizer(world / "base")("Where?").input_ids
    assert record_of(tmp_path)["records"] == 2


def test_bad_input_is_one_line_before_training(world: Path, llava, projector: Path, tmp_path: Path, capsys):
    good = {"model_name_or_path": world / "base", "vision_tower": world / "tower"}
    broken = tmp_path / "broken.json"
    broken.write_text("[{")
    for flags, message in (
        ({"model_name_or_path": "/nowhere"}, "/nowhere"),
        ({**good, "vision_tower": "/nowhere"}, "/nowhere"),
        ({**good, "data_path": "/nowhere.json"}, "no training data at /nowhere.json"),
        ({**good, "data_path": broken}, "broken.json is no json"),
        ({**good, "image_folder": "/nowhere"}, "image_folder='/nowhere' is no folder"),
        ({**good, "data_fraction": 2}, "data_fraction=2.0 is not in (0, 1]"),
        ({**good, "pretrain_mm_mlp_adapter": "/nowhere.bin"}, "/nowhere.bin"),
        ({**good, "pretrain_mm_mlp_adapter": world / "base/model.safetensors"}, "mm_projector"),
        ({**good, "visionzip_dominant": 0}, "dominant=0 is below 1"),
        ({**good, "version": "v9"}, "conv_mode='v9' is unknown"),
        (
            {**good, "mm_projector_type": "linear", "pretrain_mm_mlp_adapter": projector / "mm_projector.bin"},
            "it belongs to another model",
        ),
        ({**good, "bits": 4}, "bits=4 needs lora_enable"),
        ({**good, "bits": 5, "lora_enable": True}, "bits=5 is not 4, 8 or 16"),
        ({**good, "bits": 4, "lora_enable": True}, "bits=4 needs a whole LLaVA"),
        ({**good, "tune_mm_mlp_adapter": True, "lora_enable": True}, "give one"),
        ({**good, "report_to": "tensorboard"}, "pip install tensorboard"),
        ({**good, "deepspeed": "/nowhere.json"}, "/nowhere.json"),
        ({**good, "output_dir": world / "data.json/run"}, "data.json is a file, not a folder"),
        ({**good, "no_such_flag": 1}, "no_such_flag"),
        ({"model_name_or_path": world / "base", "tune_mm_mlp_adapter": True}, "give a vision_tower"),
        ({"model_name_or_path": world / "base", "visionzip_dominant": 3}, "give a vision_tower"),
        (
            {"model_name_or_path": world / "base", "data_path": world / "captions.json"},
            "has no record without an image",
        ),
    ):
        assert llava(tmp_path / "run", **flags) == 2, flags
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("llava.train.train: ")
        assert message in last
        assert not list(tmp_path.glob("run/*"))


def test_bad_input_is_known_before_weights_are_read(llava, make_checkpoint, tmp_path: Path, unread, capsys):
    good = {"model_name_or_path": make_checkpoint(), "tune_mm_mlp_adapter": True}
    for flags, message in (
        ({"visionzip_dominant": 0}, "dominant=0 is below 1"),
        ({"visionzip_dominant": 3, "visionzip_contextual": -1}, "contextual=-1 is below 0"),
        ({"image_aspect_ratio": "crop"}, "image_aspect_ratio='crop' is not pad, square or anyres"),
        ({"model_max_length": -5}, "model_max_length=-5 is below 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is below 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 is below 1"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": False, "lora_r": 0}, "lora_r=0 is below 1"),
        ({"save_steps": 0}, "save_steps=0 is not above 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    ):
        assert llava(tmp_path / "run", **{**good, **flags}) == 2, flags
        assert message in capsys.readouterr().err.splitlines()[-1]

"""The ways to train: LLaVA's two stages, the projector, an adapter; what they leave, and how they go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training import record_of, steps_of, turns
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
)

from checkpoints import CLIP, TOWER_PREFIX, picture, write_tower
from layouts import assert_same
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.tokenizer import load_tokenizer
from llava.train import train as llava_training
from visionzip import VisionZipConfig


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


def test_training_with_another_method(llava, tuned: Path, tmp_path: Path):
    """Its tokens are those of both counts together, and the result says how they were chosen."""
    zipped = {"visionzip_dominant": 3, "visionzip_contextual": 2, "visionzip_method": "visionzip-plus"}
    flags = {"tune_mm_mlp_adapter": True, "max_steps": 1, "save_strategy": "no"}
    assert llava(tmp_path, model_name_or_path=tuned, **zipped, **flags) == 0
    _, model, _, _ = load_pretrained_model(str(tmp_path), str(tuned), device="cpu")
    assert model.get_vision_tower().visionzip == VisionZipConfig(keep=5, method="visionzip-plus")


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
        ({"visionzip_dominant": 3, "visionzip_method": "visionzip-pluss"}, "did you mean 'visionzip-plus'"),
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

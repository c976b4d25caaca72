"""A vision tower from nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from training import TRAINER, command, record_of
from transformers import (
    CLIPImageProcessorPil,
)

from checkpoints import picture
from layouts import assert_same
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.train import contrastive
from llava.train.contrastive import ContrastiveModel, TowerArguments, collate, new_tower, word_ids


def small_tower(**changes: Any) -> dict[str, Any]:
    return {"image_size": 24, "patch_size": 4, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **changes}


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour each, and ``tower.json``, with what is true and what is false of them."""
    folder = tmp_path_factory.mktemp("colors")
    names = ["red", "lime", "blue", "white", "black", "cyan", "magenta", "yellow"]
    records = []
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        Image.new("RGB", (24, 24), name).save(folder / f"{name}.png")
        sentences = {"captions": [f"a {name} image", "an image"], "negatives": [f"a {other} image"]}
        records.append({"image": f"{name}.png", **sentences})
    (folder / "tower.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def train_tower(colors: Path) -> Callable[..., int]:
    """``python -m llava.train.contrastive`` on these images."""

    def run(out: Path, **flags: Any) -> int:
        own = {"output_dir": out, "data_path": colors / "tower.json", "image_folder": colors, "save_strategy": "no"}
        own |= {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
        return command(contrastive.main, **{**TRAINER, **own, **small_tower(), **flags})

    return run


@pytest.fixture(scope="module")
def tower_run(colors: Path, train_tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tower")
    held_out = {"validation_path": colors / "tower.json", "validation_folder": colors}
    assert train_tower(out, max_steps=20, **held_out) == 0
    return out


def sample(captions: list[str], negatives: list[str], edge: int = 24, seed: int = 0) -> dict[str, Any]:
    pixels = torch.randn(3, edge, edge, generator=torch.Generator().manual_seed(seed))
    return {"pixels": pixels, "captions": captions, "negatives": negatives}


BATCH = [
    sample(["a red ring", "a plain background"], ["a blue ring"], seed=1),
    sample(["a blue ring", "a plain background"], ["a red cross"], seed=2),
]


def test_each_image_is_compared_with_the_sentences_of_all():
    """What is false of one image may be true of another."""
    batch = collate(BATCH)
    sentences = ["a red ring", "a plain background", "a blue ring", "a red cross"]
    bags = batch["words"].tensor_split(batch["offsets"][1:].tolist())
    assert [bag.tolist() for bag in bags] == [word_ids(sentence) for sentence in sentences]
    assert batch["truth"].tolist() == [[True, True, False, False], [False, True, True, False]]
    assert batch["pixels"].shape == (2, 3, 24, 24)


def new_model(local_weight: float = 1.0, **changes: Any) -> ContrastiveModel:
    torch.manual_seed(0)
    arguments = TowerArguments(data_path="", image_folder="", **small_tower(**changes))
    return ContrastiveModel(new_tower(arguments), local_weight)


def test_the_loss_is_one_decision_for_each_pair():
    """Yes or no, by three logits: two of the CLS token share one weight, the patches have the other."""
    batch = collate(BATCH)
    output = new_model(local_weight=0.7)(**batch)
    assert output["logits"].shape == (3, 2, 4)
    losses = []
    for logits in output["logits"]:
        pairs = zip(logits.flatten(), batch["truth"].flatten(), strict=True)
        losses.append(-sum((logit if is_true else -logit).sigmoid().log() for logit, is_true in pairs) / len(BATCH))
    torch.testing.assert_close(output["loss"], (losses[0] + losses[1]) / 2 + 0.7 * losses[2])


@pytest.mark.parametrize("local_weight", [0.0, 1.0])
def test_the_decision_by_patches_can_be_left_out(local_weight: float):
    model = new_model(local_weight)
    model(**collate(BATCH))["loss"].backward()
    width = model.tower.config.hidden_size
    gradients = [model.patch_head.weight.grad, model.patch_head.bias.grad, model.sentence[-1].weight.grad[width:]]
    gradients += [model.scale.grad[1], model.bias.grad[1]]
    assert [bool(gradient.any()) for gradient in gradients] == [local_weight > 0] * len(gradients)
    assert model.image_head.weight.grad.any()


def test_the_tower_learns(tower_run: Path):
    """Enough, in 20 steps, to tell what is true of an image from what is not."""
    record = record_of(tower_run)
    losses = [entry["loss"] for entry in record["losses"] if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert record["pair_accuracy"].keys() == {"cls_last_layer", "cls_read_layer", "best_patch"}
    assert min(record["pair_accuracy"].values()) > 0.9


def test_the_folder_is_a_vision_tower(tower_run: Path):
    """Of LLaVA: it reads the patches of the layer before the last, which both decisions have learnt from."""
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(tower_run)))
    trained = torch.load(tower_run / "contrastive.pt")
    own = {f"tower.{key}": value for key, value in tower.encoder.state_dict().items()}
    assert_same(own, {key: value for key, value in trained.items() if key.startswith("tower.")})
    model = new_model()
    model.load_state_dict(trained)
    processor = CLIPImageProcessorPil.from_pretrained(tower_run)
    assert processor.to_dict() == tower.image_processor.to_dict()
    pixels = processor(picture(0), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    with torch.inference_mode():
        expected = model.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(tower(pixels), expected, atol=1e-4, rtol=1e-4)


def test_going_on_at_another_image_size(train_tower, tower_run: Path, tmp_path: Path):
    """6 x 6 positions become 12 x 12; everything else is as it was."""
    assert train_tower(tmp_path, init=tower_run, image_size=48, max_steps=1, learning_rate=0) == 0
    before, after = (torch.load(run / "contrastive.pt") for run in (tower_run, tmp_path))
    name = "tower.embeddings.position_embedding.weight"
    old, new = before.pop(name), after.pop(name)
    assert_same(after, before)
    assert torch.equal(new[0], old[0])  # of the CLS token
    old, new = old[1:].view(6, 6, -1), new[1:].view(12, 12, -1)
    torch.testing.assert_close(new[[0, 0, -1, -1], [0, -1, 0, -1]], old[[0, 0, -1, -1], [0, -1, 0, -1]])
    torch.testing.assert_close(new.mean(dim=(0, 1)), old.mean(dim=(0, 1)))
    # In between, one quarter of the way to the neighbour.
    torch.testing.assert_close(new[1, 0], 0.75 * old[0, 0] + 0.25 * old[1, 0])
    torch.testing.assert_close(new[0, 4], 0.75 * old[0, 2] + 0.25 * old[0, 1])


def test_bad_input_for_the_tower_is_one_line(train_tower, tower_run: Path, colors: Path, tmp_path: Path, capsys):
    for flags, message in (
        ({"init": "/nowhere"}, "/nowhere"),
        ({"init": tower_run, "num_layers": 3}, "has another width, depth or patch size"),
        ({"init": tower_run, "hidden_size": 64}, "has another width, depth or patch size"),
        ({"data_path": "/nowhere.json"}, "/nowhere.json"),
        ({"validation_path": colors / "tower.json"}, "validation_folder"),
    ):
        assert train_tower(tmp_path / "run", max_steps=1, **flags) == 2, flags
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("llava.train.contrastive: ")
        assert message in last
        assert not list(tmp_path.glob("run/*"))


def test_a_tower_whose_training_fails_or_is_another(train_tower, colors: Path, tmp_path: Path, capsys):
    """Is stopped as a LLaVA's is, saves nothing of it, and goes on at checkpoints of its own only."""
    wild = {"max_steps": 5, "learning_rate": 1e30, "max_grad_norm": 0}
    assert train_tower(tmp_path / "wild", **wild) == 2
    assert (
        "the loss of step 2 is not finite; the loss of step 3 is not finite" in capsys.readouterr().err.splitlines()[-1]
    )
    assert not (tmp_path / "wild").exists()
    assert train_tower(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1) == 0
    records = json.loads((colors / "tower.json").read_text())
    (tmp_path / "tower.json").write_text(json.dumps(records[::-1]))
    assert train_tower(tmp_path / "run", max_steps=2, data_path=tmp_path / "tower.json") == 2
    assert "is of a run with other arguments" in (message := capsys.readouterr().err.splitlines()[-1])
    assert message.count("(there: ") == 1 and "records='8, sha256 " in message

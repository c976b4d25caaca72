"""What is refused of transformers' checkpoints: weights that do not fit, other families, images of another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import NEXT, edit_config, picture
from layouts import write_part
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model


@pytest.fixture
def broken(converted, tmp_path: Path) -> Path:
    """A checkpoint for this test alone, which may change it."""
    return Path(shutil.copytree(converted(), tmp_path / "llava-1.5-tiny-hf"))


def test_weights_that_are_missing_or_damaged(broken: Path):
    file = broken / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    kept = {key: value.clone() for key, value in weights.items() if key != name}
    other = "language_model.model.layers.2.mlp.up_proj.weight"
    for wrong, change in (
        (name, {}),
        (name, {name: weights[name][:-1].clone()}),
        (other, {name: weights[name], other: torch.ones(64, 32)}),
    ):
        save_file(kept | change, file, metadata={"format": "pt"})
        last = wrong.rpartition("layers.")[2]
        with pytest.raises(ValueError, match=rf"do not fit LlavaForConditionalGeneration: 1 are missing.*{last}"):
            load_pretrained_model(str(broken), device="cpu")
    save_file(weights | {"vision_tower.embeddings.position_ids": torch.arange(17)[None]}, file, {"format": "pt"})
    load_pretrained_model(str(broken), device="cpu")  # of older versions, which saved buffers too
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"cannot read the weights in .*model\.safetensors \(1000 bytes\)"):
        load_pretrained_model(str(broken), device="cpu")


def test_a_part_of_a_llava_is_not_put_on_transformers_layout(broken: Path, make_checkpoint, tmp_path: Path):
    """The names of the weights are others there; said by that, not by a list of them."""
    write_part(make_checkpoint(), tmp_path / "tuned")
    (tmp_path / "tuned/mm_projector.bin").touch()
    with pytest.raises(ValueError, match=r"in transformers' layout: .*visionzip convert SRC DST --to original"):
        load_pretrained_model(str(tmp_path / "tuned"), model_base=str(broken), device="cpu")


def test_the_processor_is_looked_for_before_the_weights_are_read(broken: Path, monkeypatch: pytest.MonkeyPatch):
    for file in broken.glob("*processor_config.json"):
        file.unlink()
    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", None)
    with pytest.raises(OSError, match="has no image processor that can be read"):
        load_pretrained_model(str(broken), device="cpu")


def test_other_families_and_parts_are_refused(broken: Path):
    with pytest.raises(ValueError, match="leave model_base out"):
        load_pretrained_model(str(broken), model_base="lmsys/vicuna-7b-v1.5", device="cpu")
    edit_config(broken, model_type="llava", vision_config={"model_type": "pixtral"})
    with pytest.raises(ValueError, match="type 'llava' with a vision tower of type 'pixtral': supported are"):
        load_pretrained_model(str(broken), device="cpu")
    edit_config(broken, model_type="mllama")
    with pytest.raises(ValueError, match="of type 'mllama'"):
        load_pretrained_model(str(broken), device="cpu")


def test_images_that_are_not_the_models(both):
    _, model, processor = both()[1]
    _, anyres, _ = both(**NEXT)[1]
    image = process_images([picture(0)], processor, model.config)[0]
    tiles = process_images([picture(0)], processor, anyres.config)[0]
    for call, message in (
        (lambda: model.visual_tokens([tiles]), r"come as \[5\] tiles, but this model reads each as one tile"),
        (lambda: anyres.visual_tokens([image], [(90, 60)]), r"come as \[1\] tiles, .* the whole image and a grid"),
        (lambda: anyres.visual_tokens([tiles]), "give image_sizes"),
        (lambda: anyres.visual_tokens([tiles], [(30, 100)]), r"makes a grid of 1 x"),
        (lambda: model.visual_tokens([image, image, image.log()]), r"images\[2\] has \d+ pixels that are NaN"),
        (lambda: model.visual_tokens([image, image], [(90, 60)]), "image_sizes has 1 entries for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

"""Checkpoints that are not right: what is wrong is said before anything large is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints import CLIP, TOWER_PREFIX, edit_config, edit_weights
from layouts import FILE, LAYOUTS, Weights, load, without, write_lora, write_part
from llava.model.builder import load_pretrained_model

ENCODER = TOWER_PREFIX + "vision_model."


def reshaped(key: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {key: weights[key][:-1].clone()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def remove_a_shard(folder: Path) -> None:
    LAYOUTS["bin_shards"](folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def tower(folder: Path) -> Path:
    return folder.parent / "tower"


LAYER = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "embeddings.position_embedding.weight"
BROKEN = {
    "weight missing": (
        lambda folder: edit_weights(folder, without(LAYER)),
        rf"llava do not fit LlavaLlamaForCausalLM: 1 missing from the checkpoint, such as {LAYER}\..*incomplete",
    ),
    "weight unexpected": (
        lambda folder: edit_weights(folder, lambda weights: weights | {"model.resampler": torch.ones(32)}),
        r"1 not part of the model, such as model\.resampler",
    ),
    "weight of another shape": (
        lambda folder: edit_weights(folder, reshaped(LAYER)),
        rf"1 of another shape than the model's, such as {LAYER} \(model \(64, 32\), checkpoint \(63, 32\)\)",
    ),
    "weight of the tower missing": (
        lambda folder: edit_weights(folder, without(ENCODER + EMBEDDING)),
        rf"1 missing from the checkpoint, such as {ENCODER}{EMBEDDING}",
    ),
    "config of another model": (
        lambda folder: edit_config(folder, num_hidden_layers=3, intermediate_size=32),
        r"9 missing .*model\.layers\.2.*6 of another shape",
    ),
    "shard missing": (
        remove_a_shard,
        r"incomplete: 1 of 2 shards named in pytorch_model\.bin\.index\.json .*\(pytorch_model-00002-of-00002\.bin\)",
    ),
    "no weights": (lambda folder: (folder / FILE).unlink(), r"llava has no weights: expected model\.safetensors"),
    "cut short": (lambda folder: cut(folder / FILE), r"model\.safetensors \(\d+ bytes\): .* download it again"),
    "index cut short": (
        lambda folder: [LAYOUTS["shards"](folder), cut(folder / "model.safetensors.index.json")],
        r"cannot read .*model\.safetensors\.index\.json: .* download it again",
    ),
    "config cut short": (
        lambda folder: cut(folder / "config.json"),
        "cannot read the config of .*llava: it is damaged.*not a valid JSON file",
    ),
    "git-lfs": (
        lambda folder: (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1"),
        r"model\.safetensors \(42 bytes\): .*git-lfs",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"llava has no config\.json: copy"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.model").unlink(),
        r"llava has no tokenizer: it needs tokenizer\.model or tokenizer\.json .*copy it there",
    ),
    "tokenizer from git-lfs": (
        lambda folder: (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1"),
        "cannot read the tokenizer in .*llava: .* download it again",
    ),
    "llava-hf": (
        lambda folder: edit_config(
            folder, "mm_vision_tower", model_type="llava", architectures=["LlavaForConditionalGeneration"]
        ),
        "not an original LLaVA checkpoint .*'LlavaForConditionalGeneration'.* such as liuhaotian/llava-v1.5-7b",
    ),
    "plain Llama": (
        lambda folder: edit_config(folder, "mm_vision_tower", model_type="llama", architectures=["LlamaForCausalLM"]),
        "not an original LLaVA checkpoint .*'LlamaForCausalLM'.* such as liuhaotian/llava-v1.5-7b",
    ),
    "MPT": (
        lambda folder: edit_config(folder, model_type="llava_mpt", architectures=["LlavaMptForCausalLM"]),
        "'LlavaMptForCausalLM'.*supported are LlavaLlamaForCausalLM",
    ),
    "projector type": (
        lambda folder: edit_config(folder, mm_projector_type="resampler"),
        "mm_projector_type='resampler' is unknown: use",
    ),
    "select layer": (
        lambda folder: edit_config(folder, mm_vision_select_layer=-9),
        r"mm_vision_select_layer=-9 is outside the vision tower's 5 hidden states",
    ),
    "tower missing": (
        lambda folder: shutil.rmtree(tower(folder)),
        r"mm_vision_tower='.*tower'.* set mm_vision_tower in the checkpoint's config\.json",
    ),
    "tower unreachable": (
        lambda folder: edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336"),
        "mm_vision_tower='openai/clip-vit-large-patch14-336'.* Download it and set mm_vision_tower",
    ),
    "tower of another type": (
        lambda folder: edit_config(tower(folder), model_type="dinov2"),
        r"tower' is of type 'dinov2': supported are \['clip', 'siglip'\]",
    ),
    "image processor unreachable": (
        lambda folder: edit_config(folder, mm_vision_tower="openai/clip", mm_vision_config=CLIP),
        r"no image processor: .*'openai/clip' has a preprocessor_config\.json.* Copy",
    ),
}
BROKEN_TOWER = {  # of a checkpoint that does not have the tower's weights
    "no weights": (lambda folder: (tower(folder) / FILE).unlink(), "tower has no weights: expected"),
    "weight missing": (
        lambda folder: edit_weights(tower(folder), without("vision_model." + EMBEDDING)),
        rf"tower' lacks 1 weights.* such as {EMBEDDING}: .*set mm_vision_tower",
    ),
    "weight of another shape": (
        lambda folder: edit_weights(tower(folder), reshaped("vision_model." + EMBEDDING)),
        rf"tower' lacks 1 weights, or has them in another shape, such as {EMBEDDING}",
    ),
    "cut short": (lambda folder: cut(tower(folder) / FILE), r"tower/model\.safetensors .*: download it again"),
}


@pytest.mark.parametrize(
    ("tower_inside", "damage", "message"),
    [
        pytest.param(inside, *case, id=f"{kind}-{name}")
        for kind, inside, cases in (("checkpoint", True, BROKEN), ("tower", False, BROKEN_TOWER))
        for name, case in cases.items()
    ],
)
def test_broken(tower_inside: bool, damage: Callable[[Path], None], message: str, copied, unread, offline):
    folder = copied(tower_inside=tower_inside)
    damage(folder)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        load(folder)


def test_parts_without_a_base(copied, tmp_path: Path, unread):
    source = copied()
    torch.save(write_part(source, tmp_path / "projector"), tmp_path / "projector" / "mm_projector.bin")
    write_lora(source, tmp_path / "lora")
    with pytest.raises(ValueError, match="projector holds a projector only: give its language model as model_base"):
        load(tmp_path / "projector")
    with pytest.raises(ValueError, match="lora holds a LoRA adapter: give the model it was trained on as model_base"):
        load(tmp_path / "lora")
    shutil.copy(tmp_path / "projector" / "mm_projector.bin", source)  # as liuhaotian/llava-v1.5-7b has it
    with pytest.raises(ValueError, match="leave model_base out for a full checkpoint"):
        load(source, source)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        load(tmp_path / "lora", tmp_path / "absent")


def test_parts_of_another_model(make_checkpoint, tmp_path: Path, unread):
    small, large = make_checkpoint(), make_checkpoint(hidden_size=64)
    torch.save(write_part(small, tmp_path / "projector"), tmp_path / "projector" / "mm_projector.bin")
    write_lora(small, tmp_path / "lora")
    for part in ("projector", "lora"):
        with pytest.raises(ValueError, match=r"of another shape.* \(model \(32,\), checkpoint \(64,\)\)"):
            load(tmp_path / part, large)
    edit_config(tmp_path / "lora", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"adapter in .*lora does not fit .* 4 weights .*layers\.1"):
        load(tmp_path / "lora", small)
    (tmp_path / "lora" / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lora has an adapter_config.json but no adapter_model"):
        load(tmp_path / "lora", small)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_no_cuda(make_checkpoint, unread):
    with pytest.raises(ValueError, match="device='cuda' was asked for but this machine has no CUDA: use device='cpu'"):
        load_pretrained_model(str(make_checkpoint()), device="cuda")


def test_options_that_exclude_each_other(make_checkpoint, unread):
    with pytest.raises(ValueError, match="load_8bit and load_4bit exclude each other: choose one"):
        load(make_checkpoint(), load_8bit=True, load_4bit=True)


@pytest.mark.skipif(transformers.utils.is_flash_attn_2_available(), reason="about machines without flash-attn")
def test_flash_attention_is_not_installed(make_checkpoint, unread):
    with pytest.raises(ImportError, match="FlashAttention2"):
        load(make_checkpoint(), use_flash_attn=True)


@pytest.mark.parametrize("path", ["/absent/llava", "./absent", "~/absent/llava", "a/b/c"])
def test_no_such_folder(path: str):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*owner/name"):
        load_pretrained_model(path, device="cpu")


def test_no_such_model_on_the_hub(offline):
    with pytest.raises(OSError, match=r"cannot read the config of nobody/nothing: .* Check the name") as raised:
        load_pretrained_model("nobody/nothing", device="cpu")
    assert "\n" not in str(raised.value)  # transformers' own reason has several lines

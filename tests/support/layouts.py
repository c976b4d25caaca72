"""The layouts in which LLaVA's weights are stored: turns a tiny checkpoint into each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
)

from checkpoints import CLIP, LANGUAGE_MODEL, edit_config, edit_weights, scale_up, write_tokenizer
from llava.cli import main
from llava.model.builder import load_pretrained_model

Weights = dict[str, Tensor]
FILE = "model.safetensors"


def load(folder: Path, base: Path | None = None, **options: Any) -> Any:
    return load_pretrained_model(str(folder), base and str(base), device="cpu", **options)[1]


def weights_of(folder: Path) -> Weights:
    return load_file(folder / FILE)


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(actual[key], value)]


def save_safetensors(weights: Weights, path: Path) -> None:
    save_file(weights, path, metadata={"format": "pt"})


def to_shards(folder: Path, stem: str, suffix: str, save: Callable[[Weights, Path], None]) -> None:
    weights = weights_of(folder)
    (folder / FILE).unlink()
    weight_map = {key: f"{stem}-0000{1 + number % 2}-of-00002{suffix}" for number, key in enumerate(weights)}
    for name in set(weight_map.values()):
        save({key: value for key, value in weights.items() if weight_map[key] == name}, folder / name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def to_bin(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / FILE).unlink()


def as_git_does(folder: Path) -> None:
    """Both formats are listed, as all small files are there, but only the safetensors were fetched."""
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "absent.bin"}}))


LAYOUTS = {
    "file": lambda folder: None,
    "shards": lambda folder: to_shards(folder, "model", ".safetensors", save_safetensors),
    "bin": to_bin,
    "bin_shards": lambda folder: to_shards(folder, "pytorch_model", ".bin", torch.save),
    "unused_index": as_git_does,
}


def write_part(source: Path, folder: Path) -> Weights:
    """A folder with a checkpoint's config; returns weights of another projector."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    generator = torch.Generator().manual_seed(1)
    projector = {key: value for key, value in weights_of(source).items() if key.startswith("model.mm_projector.")}
    return {key: torch.randn(value.shape, generator=generator) for key, value in projector.items()}


def write_lora(source: Path, folder: Path, suffix: str = ".bin") -> Weights:
    """An adapter as LLaVA's training writes it; returns all weights of the model with it merged by hand."""
    beside = {**write_part(source, folder), "lm_head.weight": torch.randn(480, 32)}
    torch.save({f"base_model.model.{key}": value for key, value in beside.items()}, folder / "non_lora_trainables.bin")
    parts = ["self_attn.q_proj", "mlp.up_proj"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    settings["target_modules"] = [part.split(".")[1] for part in parts]  # of the vision tower too, by name
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    merged, adapter = weights_of(source) | beside, {}
    for name in (f"model.layers.{layer}.{part}" for layer in range(2) for part in parts):
        weight = merged[f"{name}.weight"]
        down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
        adapter |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        merged[f"{name}.weight"] = weight + 8 / 4 * up @ down
    (torch.save if suffix == ".bin" else save_safetensors)(adapter, folder / f"adapter_model{suffix}")
    return merged


def without(*keys: str) -> Callable[[Weights], Weights]:
    """For edit_weights: takes these away."""
    return lambda weights: {key: value for key, value in weights.items() if key not in keys}


def convert(source: Path, destination: Path, to: str) -> int:
    """``visionzip convert``; returns its exit status."""
    return main(["convert", str(source), str(destination), "--to", to])


def write_native(folder: Path, *, is_next: bool = False, old_names: bool = True) -> None:
    """A checkpoint as llava-hf's: 512 rows, ``<image>`` and ``<pad>``, nothing of LLaVA's own config.

    Args:
        folder: where it goes.
        is_next: a LLaVA-NeXT.
        old_names: config, weights and files as transformers before 5.0 wrote them, which those on the hub have.
    """
    torch.manual_seed(0)
    config_class, model_class = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration)
        if is_next
        else (LlavaConfig, LlavaForConditionalGeneration)
    )
    pinpoints = {"image_grid_pinpoints": [[56, 112], [112, 56], [168, 56]]} if is_next else {}
    text = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith(("mm_", "image_"))}
    config = config_class(
        text_config=LlamaConfig(**{**text, "vocab_size": 512}),
        vision_config=CLIPVisionConfig(**CLIP, vocab_size=32000),  # a field that says nothing, as theirs have
        image_token_index=480,
        image_seq_length=16,
        **pinpoints,
    )
    model = model_class(config)
    scale_up(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_mean=[0.1, 0.2, 0.3]
    )
    LlavaProcessor(processor, tokenizer, patch_size=14).save_pretrained(folder)
    if old_names:
        _make_old(folder, is_next)


def _make_old(folder: Path, is_next: bool) -> None:
    edit_weights(
        folder,
        lambda all_: {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in all_.items()},
    )
    values = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(values.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(values))
    newline = {"use_image_newline_parameter": True} if is_next else {}
    own = {"ignore_index": -100, "pad_token_id": 481, "vocab_size": 512, "torch_dtype": "float32", **newline}
    edit_config(folder, "dtype", "image_seq_length", "multimodal_projector_bias", "tie_word_embeddings", **own)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    edit_config(folder, text_config={**text, "rope_theta": theta, "pad_token_id": 481, "torch_dtype": "float32"})
    (folder / "added_tokens.json").write_text('{"<image>": 480, "<pad>": 481}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 480: "<image>", 481: "<pad>"}
    settings["added_tokens_decoder"] = {str(index): {"content": name, **flags} for index, name in names.items()}
    settings |= {"processor_class": "LlavaProcessor", "clean_up_tokenization_spaces": False, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def generate(model: Any) -> Tensor:
    """A greedy answer of four tokens about an image of noise."""
    edge = model.get_vision_tower().config.image_size
    image = torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    prompt = torch.tensor([[1, 5, 6, -200, 7, 8]])
    return model.generate(prompt, images=image, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def device_map_for(model_class: type, config: Any, room: float) -> tuple[dict[str, Any], set[str]]:
    """Where accelerate puts a model's parts if this share of it has room, and what of its inner model is left out."""
    with torch.device("meta"):
        model = model_class(config)
    size = sum(value.nbytes for value in model.parameters())
    memory = {"cpu": int(room * size), "disk": size}
    places = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    return places, {name.split(".")[1] for name, place in places.items() if place == "disk" and name != "lm_head"}

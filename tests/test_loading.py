"""Every layout that LLaVA checkpoints come in, on tiny ones, and what is said when one is not right."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    CLIP,
    LANGUAGE_MODEL,
    SIGLIP,
    TOWER_PREFIX,
    edit_config,
    edit_weights,
    write_checkpoint,
    write_hub_tower,
    write_qwen_tokenizer,
    write_tokenizer,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaQwenForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import LlavaMetaForCausalLM
from visionzip import visionzip

Weights = dict[str, Tensor]
FILE = "model.safetensors"
ENCODER = TOWER_PREFIX + "vision_model."
PROMPT = torch.tensor([[1, 5, 6, -200, 7, 8]])


def load(folder: Path, base: Path | None = None, **options: Any) -> Any:
    return load_pretrained_model(str(folder), base and str(base), device="cpu", **options)[1]


def weights_of(folder: Path) -> Weights:
    return load_file(folder / FILE)


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(actual[key], value)]


def generate(model: Any) -> Tensor:
    edge = model.get_vision_tower().config.image_size
    pixels = torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    return model.generate(PROMPT, images=pixels.to(model.dtype), max_new_tokens=4, min_new_tokens=4, do_sample=False)


@pytest.fixture
def copied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint for this test alone, which may change it and the folder ``tower`` beside it."""

    def make(**options: Any) -> Path:
        source = make_checkpoint(**options)
        folder = shutil.copytree(source, tmp_path / "llava")
        shutil.copytree(source.with_name(source.name + "-tower"), tmp_path / "tower")
        edit_config(folder, mm_vision_tower=str(tmp_path / "tower"))
        return folder

    return make


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """What users would read, from transformers too."""
    transformers.logging.enable_propagation()
    yield caplog.messages
    transformers.logging.disable_propagation()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a LLaVA's weights are read: what can be known before has to be said before."""
    read = PreTrainedModel._load_pretrained_model

    def guarded(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(model, LlavaMetaForCausalLM), "too late: the weights are being read"
        return read(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(guarded))


# Full checkpoints


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


@pytest.mark.parametrize("tower_inside", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_checkpoint(layout: str, tower_inside: bool, make_checkpoint, copied, warnings):
    folder = copied(tower_inside=tower_inside)
    LAYOUTS[layout](folder)
    assert_same(load(folder).state_dict(), weights_of(make_checkpoint()))
    assert not warnings


def test_tower_inside_the_checkpoints_folder(make_checkpoint, copied):
    folder = copied(tower_inside=False)
    (folder.parent / "tower").rename(folder / "encoder")
    edit_config(folder, mm_vision_tower="encoder")
    assert_same(load(folder).state_dict(), weights_of(make_checkpoint()))


@pytest.mark.parametrize("vision", [CLIP, {**SIGLIP, "vision_use_head": True}], ids=["clip", "siglip"])
def test_tower_as_on_the_hub(vision: dict[str, Any], tmp_path: Path, warnings):
    """``openai/clip-vit-large-patch14-336`` is the whole CLIP: two configs in one, and the text encoder's weights."""
    folder = write_checkpoint(tmp_path / "llava", vision=vision, tower_inside=False)
    write_hub_tower(tmp_path / "llava-tower", vision)
    expected = weights_of(tmp_path / "llava-tower")
    warnings.clear()
    own = load(folder).get_vision_tower().vision_tower.state_dict()
    assert_same(own, {key: expected[key] for key in own})
    assert not warnings


def test_siglip_without_what_is_never_used(tmp_path: Path, warnings):
    """LLaVA-OneVision's checkpoints lack the encoder's last layer and its pooling head."""
    folder = write_checkpoint(tmp_path / "llava", vision={**SIGLIP, "vision_use_head": True})
    unused = tuple(ENCODER + name for name in ("encoder.layers.3.", "post_layernorm.", "head."))
    edit_weights(folder, lambda weights: {key: value for key, value in weights.items() if not key.startswith(unused)})
    model = load(folder)
    assert not warnings
    assert generate(visionzip(model, dominant=4, contextual=2)).shape == (1, 4)
    with pytest.raises(ValueError, match="layer=-1 has no weights in this checkpoint"):
        visionzip(model, dominant=4, contextual=2, layer=-1)
    model.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "saved"), weights_of(folder))


def test_obsolete_buffers(copied, make_checkpoint):
    folder = copied()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        ENCODER + "embeddings.position_ids": torch.arange(17)[None],
    }
    edit_weights(folder, lambda weights: weights | buffers)
    assert_same(load(folder).state_dict(), weights_of(make_checkpoint()))


# Configs


@pytest.mark.parametrize(
    ("model_type", "model_class", "theta"),
    [
        ("llava_llama", LlavaLlamaForCausalLM, 10000.0),
        ("llava_mistral", LlavaMistralForCausalLM, 1000000.0),
        ("llava_qwen", LlavaQwenForCausalLM, 1000000.0),
    ],
)
def test_backbones(model_type: str, model_class: type, theta: float, tmp_path: Path):
    tied = model_type == "llava_qwen"
    folder = write_checkpoint(
        tmp_path / "llava", model_type=model_type, rope_theta=theta, tie_word_embeddings=tied, sliding_window=None
    )
    if tied:
        (folder / "tokenizer.model").unlink()
        write_qwen_tokenizer(folder)
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert type(model) is model_class
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, theta ** -(torch.arange(0, 8, 2) / 8))
    expected = weights_of(folder)
    assert ("lm_head.weight" in expected) is not tied
    assert_same(model.state_dict(), {"lm_head.weight": expected["model.embed_tokens.weight"], **expected})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    text = "a cat<|im_end|>" if tied else "a cat"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "a cat"
    assert tokenizer(text).input_ids[0] == (tokenizer.convert_tokens_to_ids("a") if tied else tokenizer.bos_token_id)
    model.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "saved"), expected)


EARLY = {  # fields of liuhaotian/llava-v1.5-7b that are transformers' own now, or nobody's
    "model_type": "llava",
    "torch_dtype": "float16",
    "max_length": 4096,
    "mm_resampler_type": None,
    "rope_scaling": None,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "transformers_version": "4.31.0",
}


@pytest.mark.parametrize(
    ("removed", "changes", "name"),
    [
        ([], EARLY, None),
        (["architectures"], {"model_type": "llava"}, None),
        (["architectures"], {}, None),
        (["architectures", "model_type"], {}, "llava-v1.5-7b"),
        ([], {"architectures": ["LlamaForCausalLM"]}, None),  # what a projector was pretrained on
    ],
)
def test_configs(removed: list[str], changes: dict[str, Any], name: str | None, copied, warnings):
    folder = copied()
    edit_config(folder, *removed, **changes)
    model = load(folder, model_name=name)
    assert type(model) is LlavaLlamaForCausalLM and model.config.model_type == "llava_llama"
    assert model.dtype == torch.float32 and not warnings


def test_hint_where_the_config_is_silent(copied):
    folder = copied(model_type="llava_mistral", sliding_window=None)
    edit_config(folder, "architectures", "model_type")
    assert type(load(folder, model_name="llava-v1.6-mistral-7b")) is LlavaMistralForCausalLM


def test_vicunas_generation_config(copied, tmp_path: Path):
    """It samples without saying so, which transformers refuses to save."""
    folder = copied()
    settings = {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load(folder)
    assert generate(model).shape == (1, 4)
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved", base=None).generation_config.top_p == 0.6


# Parts that complete a base


@pytest.fixture
def language_model(make_checkpoint, tmp_path: Path) -> Path:
    """The plain language model of a checkpoint."""
    folder = tmp_path / "vicuna"
    folder.mkdir()
    vision = ("model.mm_projector.", "model.vision_tower.")
    weights = {key: value for key, value in weights_of(make_checkpoint()).items() if not key.startswith(vision)}
    save_safetensors(weights, folder / FILE)
    values = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith("mm_")}
    (folder / "config.json").write_text(
        json.dumps({**values, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    write_tokenizer(folder)
    return folder


def write_part(source: Path, folder: Path) -> Weights:
    """A folder with a checkpoint's config; returns weights of another projector."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    generator = torch.Generator().manual_seed(1)
    projector = {key: value for key, value in weights_of(source).items() if key.startswith("model.mm_projector.")}
    return {key: torch.randn(value.shape, generator=generator) for key, value in projector.items()}


@pytest.mark.parametrize("base", ["language_model", "llava"])
@pytest.mark.parametrize(("suffix", "prefix"), [(".bin", "model."), (".bin", ""), (".safetensors", "model.")])
def test_projector(base: str, suffix: str, prefix: str, make_checkpoint, language_model, tmp_path: Path):
    source = make_checkpoint()
    projector = write_part(source, tmp_path / "projector")
    stored = {prefix + key.removeprefix("model."): value for key, value in projector.items()}
    save = save_safetensors if suffix == ".safetensors" else torch.save
    save(stored, tmp_path / "projector" / f"mm_projector{suffix}")
    model = load(tmp_path / "projector", language_model if base == "language_model" else source)
    assert_same(model.state_dict(), weights_of(source) | projector)


def test_projectors_tower_is_relative_to_its_own_folder(make_checkpoint, language_model, copied, tmp_path: Path):
    projector = write_part(copied(), tmp_path / "projector")
    torch.save(projector, tmp_path / "projector" / "mm_projector.bin")
    (tmp_path / "tower").rename(tmp_path / "projector" / "encoder")
    edit_config(tmp_path / "projector", mm_vision_tower="encoder")
    model = load(tmp_path / "projector", language_model)
    assert_same(model.state_dict(), weights_of(make_checkpoint()) | projector)


def write_lora(source: Path, folder: Path, layers: int = 2) -> Weights:
    """An adapter as LLaVA's training writes it; returns all weights of the model with it merged."""
    projector = write_part(source, folder)
    torch.save({f"base_model.model.{key}": value for key, value in projector.items()}, folder / "non_lora_trainables.bin")
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=list(range(layers)), layers_pattern="model.layers", task_type="CAUSAL_LM").save_pretrained(folder)
    merged, adapter = weights_of(source) | projector, {}
    for name in (f"model.layers.{layer}.{part}" for layer in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")):
        weight = merged[f"{name}.weight"]
        down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
        adapter |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        merged[f"{name}.weight"] = weight + 8 / 4 * up @ down
    save_safetensors(adapter, folder / "adapter_model.safetensors")
    return merged


@pytest.mark.parametrize("base", ["language_model", "llava"])
def test_lora(base: str, make_checkpoint, language_model, tmp_path: Path):
    merged = write_lora(make_checkpoint(), tmp_path / "lora")
    model = load(tmp_path / "lora", language_model if base == "language_model" else make_checkpoint())
    torch.testing.assert_close(dict(model.state_dict()), merged)
    assert type(model) is LlavaLlamaForCausalLM and generate(model).shape == (1, 4)

"""``visionzip convert``: checkpoints in LLaVA's own layout and in transformers', into each other."""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from llava.commands.screen import progress
from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN
from llava.conversation import conv_mode_for, conv_templates
from llava.mm_utils import get_model_name_from_path
from llava.model.checkpoints.configs import config_values, read_config
from llava.model.checkpoints.files import checkpoint_path, has_weights, load_weights, weight_files
from llava.model.checkpoints.layouts import (
    BACKBONES,
    NATIVE,
    STORED,
    native_config,
    native_key,
    original_config,
    original_key,
    original_values,
)
from llava.model.checkpoints.loading import check_weights, main_dtype
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.processors import (
    check_added_tokens,
    copy_sentencepiece,
    native_processor,
    original_image_processor,
    save_original_tokenizer,
    tokenizer_settings,
)
from llava.model.tokenizer import load_tokenizer
from llava.storage.folders import check_absent, check_room, whole_folder

_SHARD_BYTES = 5 * 10**9
_VOCABULARY_MULTIPLE = 64  # llava-hf's: 32000 + 2 tokens make 32064 rows
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Weight:
    """A weight of a checkpoint: where it is, and what becomes of it.

    Attributes:
        name: in LLaVA's layout, whichever it is in.
        source: (file, name there), or the tensor.
        like: a meta tensor of its shape and type.
        rows: how many it is to have; None leaves it as it is.
    """

    name: str
    source: tuple[Path, str] | Tensor
    like: Tensor
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is written."""
        return tuple(self.like.shape) if self.rows is None else (self.rows, *self.like.shape[1:])

    @property
    def size(self) -> int:
        """Bytes of what is written."""
        return math.prod(self.shape) * self.like.itemsize


def convert(args: argparse.Namespace) -> None:
    """Write a LLaVA-1.5 or LLaVA-NeXT checkpoint in transformers' layout (llava-hf/…), or one of that in LLaVA's own.

    The weights stay bit-identical, in their type; tokenizer and processor come with them, and the VisionZip setting. To
    transformers, the vocabulary gets <image> and <pad>, and as many rows as llava-hf's; back, it loses them.

    Raises:
        ValueError: the model has no counterpart in the other layout, DST exists, or the weights do not fit the config.
        OSError: a file is missing or damaged, or the disk has not enough room.
    """
    label = f"DST {args.dst}"
    check_absent(args.dst, label)
    source = _local(args.src, _FILES)  # weights are fetched when all else is known to be right
    architecture = next(iter(config_values(str(source)).get("architectures") or []), None)
    if args.to == "transformers" and architecture in NATIVE:
        raise ValueError(f"{args.src} is a {architecture}, in that layout already: did you mean --to original?")
    if args.to == "original" and architecture not in NATIVE:
        raise ValueError(
            f"{args.src} is a {architecture}, which has no counterpart in LLaVA's layout: convertible are "
            f"{' and '.join(NATIVE)}"
        )
    if Path(args.src).expanduser().is_dir() and not has_weights(source):
        raise ValueError(
            f"{args.src} is no full checkpoint: make one of a projector or LoRA and its base with `visionzip merge`"
        )
    (_to_transformers if args.to == "transformers" else _to_original)(source, args, label)


def _local(path: str, patterns: Sequence[str]) -> Path:
    """The folder of a checkpoint; of one on the hub, with the files of some patterns fetched."""
    folder = Path(checkpoint_path(path, "SRC"))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise OSError(f"SRC {path} is neither a folder nor to be had from the hub ({error})") from error


def _to_transformers(source: Path, args: argparse.Namespace, label: str) -> None:
    model_class, config = read_config(str(source), get_model_name_from_path(args.src))
    if model_class not in BACKBONES.values():
        raise ValueError(
            f"{args.src} is a {model_class.__name__}, which has no counterpart in transformers: convertible are "
            f"{', '.join(each.__name__ for each in BACKBONES.values())}"
        )
    if getattr(config, "mm_patch_merge_type", "flat") == "flat":
        config.mm_image_newline = False  # some files have the vector, which nothing reads
    with torch.device("meta"):
        tower = build_vision_tower(config, delay_load=True)
    native = native_config(config, tower, args.src)
    tokenizer = load_tokenizer(source)
    if getattr(config, "mm_use_im_patch_token", True):  # LLaVA's default, and what its loader does
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    generation = _read_json(source / "generation_config.json")
    stored = {"tokenizer": tokenizer_settings(tokenizer), "generation_config": generation}
    setattr(native, STORED, getattr(native, STORED) | stored)
    mode = conv_mode_for(f"{get_model_name_from_path(args.src)}-{native.text_config.model_type}")
    conversation = conv_templates["vicuna_v1" if mode == "llava_v1" else mode]  # what v1 models were trained on
    pad = getattr(config, "image_aspect_ratio", None) == "pad"
    processor = native_processor(tokenizer, tower.image_processor, native, conversation, pad)
    native.image_token_index = processor.image_token_id
    weights = _weights(args.src, model_class, config, native=False)
    native.dtype = main_dtype(weight.like for weight in weights)
    if (needed := len(processor.tokenizer)) > config.vocab_size:
        rows = -(-needed // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        native.text_config.vocab_size = rows
        weights = [replace(weight, rows=rows) if weight.name in _VOCABULARY else weight for weight in weights]
    if not generation:
        generation = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id")}
    generation = {**generation, "pad_token_id": processor.tokenizer.pad_token_id}
    check_room(args.dst, _size(weights), label, "make room, or choose another disk")
    with whole_folder(args.dst, label) as folder:
        _write(weights, folder, native_key)
        processor.save_pretrained(folder)
        copy_sentencepiece(source, folder)
        _write_json(folder / "generation_config.json", generation)
        native.save_pretrained(folder)
    _report(args.dst, native, weights)


def _to_original(source: Path, args: argparse.Namespace, label: str) -> None:
    native = AutoConfig.from_pretrained(source)
    config = original_config(native, args.src)
    config._name_or_path = str(source)
    tokenizer = load_tokenizer(source)
    image_token = native.image_token_index
    check_added_tokens(tokenizer, image_token, args.src)
    stored = getattr(native, STORED, {})
    config.vocab_size = stored.get("vocab_size") or _vocabulary(
        native.text_config.vocab_size, len(tokenizer), image_token
    )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = None  # of a token that goes
    image_processor = original_image_processor(source, native.vision_config)
    weights = _weights(args.src, BACKBONES[native.text_config.model_type], config, native=True)
    config.dtype = main_dtype(weight.like for weight in weights)
    generation = stored.get("generation_config")
    if not stored and (generation := _read_json(source / "generation_config.json")):
        generation.pop("pad_token_id", None)
    check_room(args.dst, _size(weights), label, "make room, or choose another disk")
    with whole_folder(args.dst, label) as folder:
        _write(weights, folder, str)
        image_processor.save_pretrained(folder)
        save_original_tokenizer(source, folder, tokenizer, image_token, stored.get("tokenizer"))
        if generation:
            _write_json(folder / "generation_config.json", generation)
        _write_json(folder / "config.json", original_values(config))
    _report(args.dst, config, weights)


def _vocabulary(rows: int, tokens: int, image_token: int) -> int:
    """How many rows the embedding had before ``<image>`` came: all, if it had some to spare (Qwen's)."""
    grown = rows <= -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return image_token if grown else rows


def _weights(path: str, model_class: type, config: Any, native: bool) -> list[Weight]:
    """All weights of a checkpoint that its model has, checked by names and shapes; nothing large is read.

    Args:
        path: its folder, or its name on the hub, from which they are fetched.
        model_class: the LLaVA model that it is, or is to be.
        config: of that model; rows of the checkpoint's vocabulary that are more than its own are left out.
        native: the checkpoint is in transformers' layout.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: weights are missing, unexpected, or of another shape.
    """
    weights = {}
    for file in weight_files(_local(path, (*_FILES, *_WEIGHTS))):
        for key, like in load_weights(file, "meta").items():
            name = original_key(key) if native else key
            cut = native and name in _VOCABULARY and len(like) > config.vocab_size
            weights[name] = Weight(name, (file, key), like, config.vocab_size if cut else None)
    shapes = {name: weight.shape for name, weight in weights.items()}
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    tower = check_weights(model, shapes, {})
    weights |= {name: Weight(name, value, value.to("meta")) for name, value in tower.items()}
    own = model.state_dict().keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return [weight for name, weight in weights.items() if name in own]


def _size(weights: list[Weight]) -> int:
    return sum(weight.size for weight in weights)


def _write(weights: list[Weight], folder: Path, key_of: Callable[[str], str]) -> None:
    """Write safetensors, shard by shard: no more than one is in memory."""
    shards: list[list[Weight]] = [[]]
    for weight in weights:
        if shards[-1] and _size([*shards[-1], weight]) > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(weight)
    weight_map = {}
    with progress(len(weights), "weights", "tensors") as bar:
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for weight, value in _read(shard):
                tensors[key_of(weight.name)] = value
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": _size(weights)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _read(weights: list[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """Each weight's values, with as many rows as it is to have."""
    files: dict[Path, dict[str, Tensor]] = {}  # mapped, not read
    for weight in weights:
        value = weight.source
        if not isinstance(value, Tensor):
            file, key = value
            if file not in files:
                files[file] = load_weights(file)
            value = files[file][key]
        if weight.rows is not None:
            value = _resized(value, weight.rows)
        yield weight, value.clone(memory_format=torch.contiguous_format)  # tied ones may share memory


def _resized(value: Tensor, rows: int) -> Tensor:
    """The first ``rows`` rows (V, D), or more: new ones are the mean of all, which never wins greedy decoding."""
    if rows <= len(value):
        return value[:rows]
    mean = value.float().mean(dim=0, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(rows - len(value), -1)])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _report(path: str, config: Any, weights: list[Weight]) -> None:
    print(f"wrote {path}: {config.architectures[0]}, {_size(weights) / 1e9:.1f} GB")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``visionzip convert``."""
    parser.add_argument("src", metavar="SRC", help="full checkpoint: folder or hub name")
    parser.add_argument("dst", metavar="DST", help="new folder")
    parser.add_argument(
        "--to", required=True, choices=["transformers", "original"], help="layout to write, llava-hf's or LLaVA's own"
    )
    parser.set_defaults(run=convert)

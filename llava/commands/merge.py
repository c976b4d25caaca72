"""``visionzip merge``: a tuned projector or LoRA and the model under it, as one checkpoint."""

from __future__ import annotations

import argparse
import copy
from itertools import chain
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig

from llava.commands.arguments import DTYPES
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints.configs import checkpoint_parts, read_config
from llava.model.checkpoints.files import checkpoint_path, find_file, has_weights, load_weights, weight_files
from llava.model.checkpoints.loading import main_dtype
from llava.serve.cli import describe
from llava.storage.folders import check_absent, check_room, whole_folder


def merge(args: argparse.Namespace) -> None:
    """Write a tuned projector or LoRA and its base as one full checkpoint, which loads alone, zipped as it was tuned.

    It has all weights, those of the vision tower too, with the tokenizer and the image processor.

    Raises:
        ValueError: there is nothing to merge, the output exists, or the parts do not fit together.
        OSError: a file is missing or damaged, or the disk has not enough room.
    """
    label = f"--output {args.output}"
    check_absent(args.output, label)
    for flag, path in (("--model-path", args.model_path), ("--model-base", args.model_base)):
        checkpoint_path(path, flag)
    adapter = find_file(args.model_path, "adapter_config.json") is not None
    if not adapter and Path(args.model_path).is_dir() and has_weights(args.model_path):
        raise ValueError(f"{args.model_path} is a full checkpoint already: there is nothing to merge")
    model_class, config = read_config(args.model_path, None)
    checkpoint_parts(args.model_path, args.model_base)
    dtype = getattr(torch, args.dtype) if args.dtype else _dtype_of(args.model_base)
    with torch.device("meta"):
        size = sum(value.numel() for value in model_class(copy.deepcopy(config)).state_dict().values()) * dtype.itemsize
    check_room(args.output, size, label, "make room, choose another disk, or a smaller --dtype")
    tokenizer, model, _, _ = load_pretrained_model(args.model_path, args.model_base, device="cpu", dtype=dtype)
    model.config.use_cache = True  # training turns it off
    if find_file(args.model_base, "generation_config.json"):
        # As it is: changed, one that has a temperature but no do_sample (Vicuna's) would not be saved by transformers.
        model.generation_config = GenerationConfig.from_pretrained(args.model_base)
    with whole_folder(args.output, label) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"wrote {args.output}: {describe(model)}, {size / 1e9:.1f} GB")


def _dtype_of(base: str) -> torch.dtype:
    """Type of most of a checkpoint's weights: from the files' headers, or on the hub from its config."""
    if Path(base).is_dir():
        files = (load_weights(file, "meta").values() for file in weight_files(base))
        return main_dtype(chain.from_iterable(files))
    values, _ = PretrainedConfig.get_config_dict(base)
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    return getattr(torch, name)


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip merge``."""
    parser.add_argument("--model-path", required=True, help="tuned projector or LoRA: folder or hub name")
    parser.add_argument("--model-base", required=True, help="the model it was tuned on: folder or hub name")
    parser.add_argument("--output", "--out", required=True, metavar="FOLDER", help="where the full checkpoint goes")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: the base's)")
    parser.set_defaults(run=merge)

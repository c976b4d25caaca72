"""``visionzip benchmark tuning``: what a step of projector tuning takes with fewer visual tokens, and with a cache.

A step is what training does with a batch: visual tokens, forward, backward through the frozen language model (with
gradient checkpointing, as the scripts have it), and AdamW on the projector.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from llava.commands.arguments import add_budget_arguments, add_measuring_arguments
from llava.commands.parsers import positive
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.measure import report
from llava.measure.meters.peak import Request, peaks
from llava.measure.meters.timing import time_interleaved
from llava.measure.models import shapes
from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.train.cache import drop_tower
from visionzip import VisionZipConfig, unzip, visionzip

WAYS = {
    "vanilla": "all visual tokens; the vision tower runs in each step",
    "vanilla, cached": "all visual tokens, from a cache; no vision tower",
    "zipped": "VisionZip; the vision tower runs in each step",
    "zipped, cached": "VisionZip's tokens from a cache; no vision tower",
}


def build_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A LLaVA of random weights of a named shape, made on the device, ready to tune its projector."""
    model = shapes.build_model(shape, device, dtype)
    model.config.use_cache = False
    model.get_model().mm_projector.requires_grad_(True)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def step_of(way: str, model: Any, args: argparse.Namespace) -> Callable[[], float]:
    """A step in one of :data:`WAYS`; it returns the loss.

    Args:
        way: which.
        model: from :func:`build_model`; steps of several ways share it.
        args: as :func:`add_tuning_arguments` parses them.
    """
    weight, tower = model.get_input_embeddings().weight, model.get_vision_tower()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, model.config.vocab_size, (args.batch_size, args.text_tokens), generator=generator)
    sentinel = torch.full((args.batch_size, 1), IMAGE_TOKEN_INDEX)
    ids = torch.cat([sentinel, text], dim=1).to(weight.device)
    labels = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX)
    edge, is_zipped, is_cached = tower.config.image_size, way.startswith("zipped"), way.endswith("cached")
    shape = (args.batch_size, 3, edge, edge)
    if is_cached:
        shape = (
            args.batch_size,
            1,
            args.dominant + args.contextual if is_zipped else tower.num_patches,
            tower.hidden_size,
        )
    random = torch.randn(shape, generator=generator).to(weight.dtype)  # on the CPU, where a data loader leaves it
    images = [EncodedImage(image) for image in random] if is_cached else random
    optimizer = torch.optim.AdamW(model.get_model().mm_projector.parameters(), lr=1e-5)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step() -> float:
        if is_zipped:
            visionzip(model, args.dominant, args.contextual)
        else:
            unzip(model)
        moved = [image.to(weight.device) for image in images] if is_cached else images.to(weight.device)
        loss = model(input_ids=ids, labels=labels, images=moved).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def benchmark_tuning(args: argparse.Namespace) -> None:
    """Measure a step of projector tuning with and without VisionZip, with and without --cache_visual_tokens.

    Time and peak memory, as ratios of one interleaved run; the memory is that of a fresh process each. The model has
    random weights, made on the device. A step has visual tokens, forward and backward with gradient checkpointing, and
    AdamW on the projector; reading and preparing images, which a cache saves too, is not in it. Ratios depend on the
    length of the text: --text-tokens. On two CPU cores the shape that is the default there takes less than two minutes.

    Raises:
        ValueError: a count is below its limit or leaves nothing to compress, or there is no such device.
        IsADirectoryError: the output is a folder.
    """
    VisionZipConfig(args.dominant, args.contextual)
    report.check_request(args)
    on_cuda = args.device.startswith("cuda")
    args.shape = args.shape or ("llava-1.5-7b" if on_cuda else "llava-1.5-small")
    args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    patches = shapes.SHAPES[args.shape].visual_tokens
    if args.dominant + args.contextual >= patches:
        raise ValueError(
            f"--dominant {args.dominant} --contextual {args.contextual} leaves nothing to compress: --shape "
            f"{args.shape} has {patches} visual tokens"
        )
    # Before this process has a model, and on a GPU in turn: they share its memory.
    names = ("shape", "device", "dtype", "batch_size", "text_tokens", "dominant", "contextual")
    request = {name: getattr(args, name) for name in names}
    memory = peaks(run_twice, dict.fromkeys(WAYS, request), "memory", at_once=1 if on_cuda else 2)
    model = build_model(args.shape, args.device, getattr(torch, args.dtype))
    steps = {way: step_of(way, model, args) for way in WAYS}
    times = time_interleaved(steps, args.device, args.rounds, "time")
    zipped = args.dominant + args.contextual
    tokens = {way: zipped if way.startswith("zipped") else patches for way in WAYS}
    title = (
        f"{args.shape}, {args.dtype}, random weights, a step of {args.batch_size} x (image + {args.text_tokens} text "
        f"tokens), {args.rounds} rounds"
    )
    rows = report.compare(args.batch_size, tokens, times, memory)
    report.show(title, report.COMPARED, rows, names=2)
    report.explain(WAYS)
    report.conclude(args, {**report.settings_of(args), "results": rows})


def run_twice(request: Request) -> None:
    """Take two steps of a model (AdamW's state comes with the first): work of which the peak memory is measured."""
    args = argparse.Namespace(**request)
    model = build_model(args.shape, args.device, getattr(torch, args.dtype))
    if args.way.endswith("cached"):
        drop_tower(model)
    step = step_of(args.way, model, args)
    step()
    step()


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark tuning``."""
    one_tile = [name for name, shape in shapes.SHAPES.items() if shape.tiles == 1]
    parser.add_argument(
        "--shape",
        choices=one_tile,
        help="model of random weights (default: llava-1.5-7b on cuda, else llava-1.5-small)",
    )
    parser.add_argument("--batch-size", type=positive, default=2, metavar="N", help="samples in a step")
    parser.add_argument("--text-tokens", type=positive, default=128, metavar="N", help="text tokens of a sample")
    add_budget_arguments(parser, (54, 10))
    add_measuring_arguments(parser, 5, None, " (default: bfloat16 on cuda, else float32)")
    parser.set_defaults(run=benchmark_tuning)

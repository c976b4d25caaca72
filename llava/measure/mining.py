"""``visionzip benchmark mining``: what it saves that a zipped Mini-Gemini looks closer at the kept patches only."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, ConvNextConfig

from llava.commands.arguments import add_budget_arguments, add_measuring_arguments
from llava.commands.parsers import positive
from llava.constants import IMAGE_TOKEN_INDEX
from llava.measure import report
from llava.measure.meters.peak import Request, peaks, weights_mib
from llava.measure.meters.timing import Measurement, time_interleaved
from llava.measure.models.shapes import VIT_L_14_336, VIT_TINY
from llava.measure.report import Columns, Row
from llava.model import MGMConfig, MGMLlamaForCausalLM
from visionzip import VisionZipConfig, unzip, visionzip

CONVNEXT_L = {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]}
CONVNEXT_TINY = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}
# CLIP, ConvNeXt, its resolution, and the language model's width, layers and MLP. In "mgm" both towers are the released
# ones, and the language model is small, for CPU.
SHAPES = {
    "mgm": (VIT_L_14_336, CONVNEXT_L, 768, (1024, 8, 2752)),
    "tiny": (VIT_TINY, CONVNEXT_TINY, 256, (64, 4, 172)),  # to try the command itself
}
MINING = {
    "released": "the released way: all stages scaled up and joined, every sub-patch projected, all patches",
    "all": "the same numbers for all patches (those of the kept ones could be gathered afterwards)",
    "kept": "with VisionZip: the kept tokens' patches only",
}
TOTALS = {
    "vanilla": "all visual tokens",
    "visionzip": "VisionZip",
}


def build_model(shape: str, device: str, dtype: torch.dtype) -> MGMLlamaForCausalLM:
    """A Mini-Gemini of random weights."""
    vision, convnext, edge, (width, layers, intermediate) = SHAPES[shape]
    config = MGMConfig(
        vocab_size=512,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        intermediate_size=intermediate,
        mm_vision_tower="random",
        mm_vision_config=CLIPVisionConfig(**vision).to_dict(),
        mm_vision_tower_aux="random",
        mm_vision_aux_config=ConvNextConfig(**convnext).to_diff_dict(),
        image_size_aux=edge,
        mm_hidden_size=vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = MGMLlamaForCausalLM(config).to(device=device, dtype=dtype)
    model.get_vision_tower().is_loaded = True
    return model.requires_grad_(False).eval()


def released_mining(model: MGMLlamaForCausalLM, tokens: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Patch info mining of all patches as the released code does it.

    Args:
        model: of one tile.
        tokens: (B, N, D) patches of CLIP.
        maps: the high-resolution tower's.

    Returns:
        (B, N, D).
    """
    size = maps[0].shape[-2:]
    scaled = [F.interpolate(each.float(), size, mode="bilinear", align_corners=False).to(each.dtype) for each in maps]
    side = model.get_vision_tower().num_patches_per_side
    cells = torch.cat(scaled, dim=1).permute(0, 2, 3, 1).unflatten(2, (side, -1)).unflatten(1, (side, -1))
    candidates = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2).contiguous()
    inner = model.get_model()
    query, keys = inner.vlm_uni_query_projector(tokens), inner.vlm_uni_aux_projector(candidates)
    attention = (query[:, :, None] @ (keys.transpose(-1, -2) / keys.shape[-1] ** 0.5)).softmax(-1)
    return (attention @ inner.vlm_uni_val_projector(candidates))[:, :, 0]


def mining_of(way: str, model: MGMLlamaForCausalLM, images: Tensor, budget: tuple[int, int]) -> Callable[[], Tensor]:
    """The mining that ``way`` (a key of :data:`MINING`) stands for; both towers have run before."""
    if way == "kept":
        visionzip(model, *budget)
    tower = model.get_vision_tower()
    keeps_cls = tower.counts is not None and tower.counts.cls_token
    encoded = tower.encode(model.whole_images(images).to(device=tower.device, dtype=tower.dtype), model._project)
    unzip(model)
    maps = model.get_vision_tower_aux()(images)
    if way == "released":
        return partial(released_mining, model, encoded.tokens, maps)
    return partial(model.look_closer, encoded, maps, keeps_cls)


def benchmark_mining(args: argparse.Namespace) -> None:
    """Time a Mini-Gemini's patch info mining alone, and from pixels to the first token, with VisionZip and without.

    All ways take turns in the same rounds; peak memory, over the weights, is that of both towers and the mining, each
    way in a fresh process.

    Raises:
        ValueError: a count is below its limit, or CUDA is asked for and not there.
    """
    VisionZipConfig(args.dominant, args.contextual)
    report.check_request(args)
    budget = args.dominant, args.contextual
    model, images = _build(vars(args))
    patches = model.get_vision_tower().num_patches
    with torch.inference_mode():
        mining: dict[str, Callable[[], Any]] = {way: mining_of(way, model, images, budget) for way in MINING}
    times = time_interleaved(mining, args.device, args.rounds, "time, mining")
    mining.clear()  # they hold the maps

    def attach(way: str) -> None:
        visionzip(model, *budget) if way.endswith("visionzip") else unzip(model)

    ids = torch.randint(3, 512, (1, args.text_tokens + 1), device=args.device)
    ids[0, args.text_tokens // 2] = IMAGE_TOKEN_INDEX
    answer = partial(model, input_ids=ids, images=images, use_cache=True, logits_to_keep=1)
    ways = {f"tokens, {way}": partial(model.visual_tokens, images) for way in TOTALS}
    ways |= {f"first token, {way}": answer for way in TOTALS}
    times |= time_interleaved(ways, args.device, args.rounds, "time, from pixels", attach)
    request = {key: getattr(args, key) for key in ("shape", "device", "dtype", "dominant", "contextual")}
    memory = peaks(mine_once, dict.fromkeys(MINING, request), "memory")
    weights = weights_mib(model)
    over_weights = {way: facts["memory_mib"] - weights for way, facts in memory.items()}
    rows = _rows(times, over_weights)
    report.show(f"{args.shape}, {args.dtype}, random weights, {patches} patches, VisionZip {budget}", _COLUMNS, rows)
    report.explain({f"mining, {way}": meaning for way, meaning in MINING.items()})
    report.conclude(args, {"setting": request, "results": rows})


def _rows(times: Mapping[str, Measurement], memory: Mapping[str, float]) -> list[Row]:
    rows = []
    for name, own in times.items():
        base = "all" if name in MINING else f"{name.split(', ')[0]}, vanilla"
        spreads = report.ratio(own.total, times[base].total)
        facts = {"what": name, "seconds": own.total, "memory_mib": memory.get(name)}
        rows.append({**facts, "ratio": spreads["median"], "quartiles": spreads["quartiles"]})
    return rows


_COLUMNS: Columns = (
    ("what", lambda row: f"mining, {row['what']}" if row["what"] in MINING else row["what"]),
    ("time", lambda row: f"{report.spread(row['seconds'])['median'] * 1e3:.1f} ms"),
    ("ratio", lambda row: f"{row['ratio']:.3f}"),
    ("quartiles", lambda row: report.quartiles(row["quartiles"])),
    ("peak over weights", lambda row: "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f} MiB"),
)


def add_mining_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark mining``."""
    parser.add_argument("--shape", choices=list(SHAPES), default="mgm", help="model of random weights")
    add_budget_arguments(parser, (54, 10))
    parser.add_argument("--text-tokens", type=positive, default=60, metavar="N", help="text tokens of the prompt")
    add_measuring_arguments(parser, 5, "float32")
    parser.set_defaults(run=benchmark_mining)


def _build(request: dict[str, Any]) -> tuple[MGMLlamaForCausalLM, Tensor]:
    """A model and an image for it."""
    dtype = getattr(torch, request["dtype"])
    model = build_model(request["shape"], request["device"], dtype)
    edge = model.config.image_size_aux
    return model, torch.randn(1, 3, edge, edge, device=request["device"], dtype=dtype)


@torch.inference_mode()
def mine_once(request: Request) -> None:
    """Run both towers, then one way's mining: work of which the peak memory is measured."""
    model, images = _build(request)
    mining_of(request["way"], model, images, (request["dominant"], request["contextual"]))()

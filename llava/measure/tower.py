"""``visionzip benchmark tower``: four ways through a vision tower of random weights, and what choosing adds to it.

The choice is everything that a method adds behind the encoder's layers: scores and keys of the attention that is read,
the projection of all patches where it chooses by those, and the choosing itself.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from llava.commands.arguments import add_batch_sizes, add_budget_arguments, add_measuring_arguments
from llava.commands.screen import say
from llava.measure import report
from llava.measure.meters.peak import Request, peaks
from llava.measure.meters.timing import Clock, Measurement, time_interleaved
from llava.measure.models.shapes import TOWERS
from llava.measure.report import Columns, Row
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from visionzip import VisionZipConfig, compress_tokens, unzip, visionzip
from visionzip.attention import merge_keys, read_attention
from visionzip.encoder import choose_tokens, hidden_states, layers_needed, reads_of, scores_and_keys
from visionzip.methods import METHODS, EncoderRead

WAYS = {
    "vanilla": "LLaVA's tower: sdpa, all layers, all hidden states",
    "unzipped": "this tower without VisionZip: stops at layer -2",
    "zipped": "this tower with VisionZip",
    "released": "VisionZip the released way: eager, attention and hidden states of all layers, then the same merging",
}
CHOICE = ("read", "projection", "choice")  # phases of choosing
PROJECTED = 4  # width behind the projector by the tower's: 4096 of 1024, as in the 7B


def build_tower(shape: str, device: str, dtype: torch.dtype) -> CLIPVisionTower:
    """Build a tower of random weights of a named shape."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(**TOWERS[shape]).to_dict()
    args = SimpleNamespace(mm_vision_config=config, mm_vision_select_layer=-2, _attn_implementation="sdpa")
    return CLIPVisionTower(shape, args, delay_load=True).to(device=device, dtype=dtype).eval()


def forward_of(way: str, tower: CLIPVisionTower, dominant: int, contextual: int) -> Callable[[Tensor], Tensor]:
    """Return the forward that ``way`` (a key of :data:`WAYS`) stands for, on the weights of ``tower``."""
    if way == "vanilla":
        return lambda images: tower.encoder(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    if way == "unzipped":
        return unzip(_sharing_weights(tower))
    if way == "zipped":
        return visionzip(_sharing_weights(tower), dominant=dominant, contextual=contextual)
    eager = _sharing_weights(tower).encoder
    eager.set_attn_implementation("eager")

    def released(images: Tensor) -> Tensor:
        with read_attention(eager.encoder.layers[-2].self_attn, merge_keys) as reader:
            outputs = eager(images, output_hidden_states=True, output_attentions=True)
        scores = outputs.attentions[-2][:, :, 0, 1:].sum(dim=1)
        return compress_tokens(outputs.hidden_states[-2], scores, reader.result(), dominant, contextual).tokens

    return released


def _sharing_weights(tower: CLIPVisionTower) -> CLIPVisionTower:
    """Copy a tower with a configuration of its own but the same parameters."""
    return copy.deepcopy(tower, memo={id(parameter): parameter for parameter in tower.parameters()})


@torch.inference_mode()
def choices(
    tower: CLIPVisionTower, images: Tensor, settings: Mapping[str, VisionZipConfig]
) -> dict[str, Callable[[], Clock]]:
    """Prepare the choosing of each setting behind a tower that has run: a pass with the phases :data:`CHOICE`.

    Args:
        tower: with nothing on it.
        images: (B, 3, h, w), by which it is run now.
        settings: by name, all of one layer.
    """
    encoder = tower.encoder
    layers = layers_needed(encoder, next(iter(settings.values())).layer)
    with read_attention(encoder.encoder.layers[layers - 1].self_attn) as reader:
        states = hidden_states(encoder, images, layers)
    bare = EncoderRead(states, True, pixels=images, grid=(tower.num_patches_per_side,) * 2)
    widths = {"mm_hidden_size": tower.hidden_size, "hidden_size": PROJECTED * tower.hidden_size}
    projector = build_vision_projector(SimpleNamespace(**widths, mm_projector_type="mlp2x_gelu")).to(states)

    def choose(config: VisionZipConfig) -> Clock:
        clock, reads = Clock(images.device), reads_of(config)
        scores, keys = scores_and_keys(reader.result(), reads, cls_token=True)
        clock.mark("read")
        projected = projector(bare.patches) if "projected" in reads else None
        clock.mark("projection")
        choose_tokens(bare.replace(scores=scores, keys=keys, projected=projected), config)
        clock.mark("choice")
        return clock

    return {name: partial(choose, config) for name, config in settings.items()}


def benchmark_tower(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Time all ways and choices interleaved, then measure the peak memory of each way.

    Args:
        args: as :func:`add_tower_arguments` parses them.

    Returns:
        A row of each way, and one of each method's choice.
    """
    device, dtype = args.device, getattr(torch, args.dtype)
    tower = build_tower(args.shape, device, dtype)
    edge, total = tower.config.image_size, args.dominant + args.contextual
    forwards = {way: forward_of(way, tower, args.dominant, args.contextual) for way in WAYS}
    settings = {f"choose {name}": VisionZipConfig(keep=total, method=name) for name in args.methods}
    tokens = dict.fromkeys(WAYS, min(total, tower.sequence_length))
    tokens |= dict.fromkeys(("vanilla", "unzipped"), tower.num_patches)
    names = ("shape", "device", "dtype", "dominant", "contextual")
    rows, chosen = [], []
    for batch in args.batch_sizes:
        images = torch.randn(batch, 3, edge, edge, device=device, dtype=dtype)
        ways = {way: partial(forward, images) for way, forward in forwards.items()}
        ways |= choices(tower, images, settings)
        times = time_interleaved(ways, device, args.rounds, f"time, batch {batch}")
        request = {**{name: getattr(args, name) for name in names}, "batch": batch}
        memory = peaks(run_once, dict.fromkeys(WAYS, request), f"memory, batch {batch}", at_once=2)
        rows += report.compare(batch, tokens, {way: times[way] for way in WAYS}, memory)
        chosen += [choice_row(name, total, batch, times[f"choose {name}"], times["unzipped"]) for name in args.methods]
    return rows, chosen


def choice_row(method: str, tokens: int, batch: int, own: Measurement, tower: Measurement) -> Row:
    """Make a row of what a method's choice takes.

    Args:
        method: its name.
        tokens: T, that it leaves of an image.
        batch: images at a time.
        own: phases :data:`CHOICE`.
        tower: the tower as it runs in front of the choice, in the same rounds.

    Returns:
        ``seconds`` of each phase, and of the tower's time the ``share`` of reading and choosing, and the
        ``share_with_projection``: the model projects the kept tokens anyway, but here all patches.
    """
    return {
        "method": method,
        "batch": batch,
        "tokens": tokens,
        "seconds": {phase: report.spread(own.phases[phase]) for phase in CHOICE},
        "share": report.ratio(own.sum_of("read", "choice"), tower.total),
        "share_with_projection": report.ratio(own.sum_of(*CHOICE), tower.total),
    }


CHOOSING: Columns = (  # of rows from choice_row()
    ("batch", lambda row: str(row["batch"])),
    ("method", lambda row: row["method"]),
    ("tokens", lambda row: str(row["tokens"])),
    *((f"{phase}, ms", lambda row, phase=phase: f"{1e3 * row['seconds'][phase]['median']:.2f}") for phase in CHOICE),
    ("of the tower", lambda row: f"{row['share']['median']:.1%}"),
    ("quartiles", lambda row: report.quartiles(row["share"]["quartiles"])),
    ("with projection", lambda row: f"{row['share_with_projection']['median']:.1%}"),
)


def benchmark(args: argparse.Namespace) -> None:
    """Measure what VisionZip costs in the vision tower, and what each method's choice adds: one interleaved run.

    Four ways through the tower, by time and peak memory; then the milliseconds of choosing --dominant + --contextual
    tokens, by method: "read" is what is computed of the scored layer's attention, "projection" that of all patches
    (the model projects the kept ones anyway), and the share is that of reading and choosing in the time of the tower
    that stops at layer -2.

    Raises:
        ValueError: a count is below its limit, a method cannot make so many tokens, or there is no such device.
        IsADirectoryError: the output is a folder.
    """
    VisionZipConfig(args.dominant, args.contextual)
    report.check_request(args)
    tokens, side = args.dominant + args.contextual, TOWERS[args.shape]["image_size"] // TOWERS[args.shape]["patch_size"]
    args.methods, refused = _able(args.methods, tokens, side)
    ways, chosen = benchmark_tower(args)
    setting = f"{args.shape}, {args.dtype}, random weights"
    report.show(
        f"{setting}, VisionZip {args.dominant} + {args.contextual} tokens, {args.rounds} rounds",
        report.COMPARED,
        ways,
        2,
    )
    report.explain(WAYS)
    report.show(f"{setting}, choosing {tokens} of {side**2} tokens, {args.rounds} rounds", CHOOSING, chosen, 2)
    say("of the tower: reading and choosing by the time of 'unzipped' in the same round, median over rounds.", "dim")
    report.explain(refused)
    report.conclude(args, {**report.settings_of(args), "results": ways, "choosing": chosen})


def _able(asked: list[str] | None, tokens: int, side: int) -> tuple[list[str], dict[str, str]]:
    """Split the methods, all if none are asked for, into those that make T tokens and why the others do not."""
    refused = {}
    for name in METHODS if asked is None else asked:
        try:
            METHODS[name].check(tokens, (side, side))
        except ValueError as error:
            if asked is not None:
                raise
            refused[name] = str(error)
    return [name for name in asked or METHODS if name not in refused], refused


@torch.inference_mode()
def run_once(request: Request) -> None:
    """Build one way's tower and run it: work of which the peak memory is measured."""
    device, dtype = request["device"], getattr(torch, request["dtype"])
    tower = build_tower(request["shape"], device, dtype)
    forward = forward_of(request["way"], tower, request["dominant"], request["contextual"])
    edge = tower.config.image_size
    forward(torch.randn(request["batch"], 3, edge, edge, device=device, dtype=dtype))


def add_tower_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``visionzip benchmark tower``."""
    parser.add_argument("--shape", choices=sorted(TOWERS), default="vit-l-14-336", help="size of the tower")
    parser.add_argument(
        "--method",
        dest="methods",
        nargs="+",
        choices=list(METHODS),
        help="whose choosing is timed beside the tower (default: all)",
    )
    add_batch_sizes(parser, [1, 5], "images at a time")
    add_budget_arguments(parser, (54, 10))
    add_measuring_arguments(parser, 5, "float32")
    parser.set_defaults(run=benchmark)

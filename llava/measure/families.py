"""``visionzip benchmark families``: from pixels to the first token of scaled Qwen models, whole, zipped and resized.

``resize`` is the same number of tokens by a smaller picture, which saves the encoder too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava.commands.arguments import add_measuring_arguments
from llava.commands.parsers import finite, positive
from llava.commands.screen import say
from llava.measure import report
from llava.measure.meters.timing import Clock, Measurement, time_interleaved
from llava.measure.report import Columns, Row
from visionzip import unzip, visionzip

_TEXT = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8}
_TEXT |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 16384}
_TOKENS = {"vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3}
# Encoders as wide and as deep beside 8 layers of width 1024 as those of the 8B and the 7B are beside theirs.
_ENCODER = {"num_heads": 4, "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": 1024}
_QWEN3 = {**_ENCODER, "depth": 6, "hidden_size": 288, "intermediate_size": 1152, "deepstack_visual_indexes": [1, 3, 5]}
_QWEN2_5 = {**_ENCODER, "depth": 8, "hidden_size": 384, "intermediate_size": 1024, "fullatt_block_indexes": [7]}


class Scaled(NamedTuple):
    """A model without its weights: its classes in transformers, the encoder, and the text's rotary positions."""

    name: str
    vision: dict[str, Any]
    rotary: dict[str, Any]

    def build(self, dtype: torch.dtype, device: str) -> Any:
        """The model, of random weights."""
        import transformers  # noqa: PLC0415 - seconds

        text = {**_TEXT, "head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **self.rotary}}
        config = getattr(transformers, f"{self.name}Config")(text_config=text, vision_config=self.vision, **_TOKENS)
        config._attn_implementation = "sdpa"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, f"{self.name}ForConditionalGeneration")(config)
        return model.to(device, dtype).requires_grad_(False).eval()


MODELS = {
    "qwen3-vl": Scaled("Qwen3VL", _QWEN3, {"mrope_section": [12, 10, 10], "mrope_interleaved": True}),
    "qwen2.5-vl": Scaled("Qwen2_5_VL", _QWEN2_5, {"mrope_section": [8, 12, 12]}),
}


def benchmark_families(args: argparse.Namespace) -> None:
    """Time one question about one image in interleaved rounds, by phases.

    Raises:
        ValueError: a flag is not as it should be.
    """
    report.check_request(args)
    model = MODELS[args.model].build(getattr(torch, args.dtype), args.device)
    rows = measure(model, args)
    edge = args.image_size
    report.show(f"{args.model}, scaled, random weights, {edge} x {edge}, {args.dtype}", _COLUMNS, rows)
    say(
        "medians; x: faster than whole in the same round. choose: from the encoder's end to the prefill; adds: what "
        "encoding and choosing take longer than for whole; of bare: the prefill's gain by the bare language model's.",
        "dim",
    )
    report.conclude(args, {"setting": report.settings_of(args), "results": rows})


def measure(model: nn.Module, args: argparse.Namespace) -> list[Row]:
    """Make a row of each way: ``way``, ``visual_tokens``, ``seconds`` by phase, and ratios to the whole image.

    Args:
        model: of :data:`MODELS`.
        args: ``keep`` (shares), ``image_size``, ``text_tokens``, ``rounds``, ``device``.
    """
    whole, shares = _inputs(model, args, 1.0), args.keep
    ways: dict[str, Callable[[], Clock]] = {"whole": partial(_pass, model, whole, args.device)}
    kept = {"whole": 1.0}
    for share in shares:
        ways[f"visionzip {share:g}"] = partial(_pass, model, whole, args.device)
        ways[f"resize {share:g}"] = partial(_pass, model, _inputs(model, args, share), args.device)
        kept |= {f"visionzip {share:g}": share, f"resize {share:g}": share}

    def before(way: str) -> None:
        unzip(model)
        if way.startswith("visionzip"):
            visionzip(model, keep=kept[way])

    tokens = {way: int(ways[way].args[1]["mm_token_type_ids"].sum()) for way in ways}
    full = tokens["whole"]
    tokens |= {way: max(1, round(kept[way] * full)) for way in ways if way.startswith("visionzip")}
    lengths = dict.fromkeys(count + args.text_tokens + 2 for count in tokens.values())
    bare = {f"bare {length}": partial(_bare, model, length, args.device) for length in lengths}
    timed = time_interleaved({**ways, **bare}, args.device, args.rounds, "families", before)
    unzip(model)
    return [_row(way, tokens[way], args.text_tokens + 2, timed, full) for way in ways]


def _row(way: str, count: int, text: int, timed: Mapping[str, Measurement], full: int) -> Row:
    own, whole = timed[way], timed["whole"]
    slow, fast = (timed[f"bare {length + text}"].total for length in (full, count))
    gains = zip(whole.phases["prefill"], own.phases["prefill"], slow, fast, strict=True)
    added = [a + b - c - d for a, b, c, d in zip(*(m.phases[p] for m in (own, whole) for p in _VISION), strict=True)]
    first = own.sum_of(*_VISION, "prefill")
    return {
        "way": way,
        "visual_tokens": count,
        "seconds": {name: report.spread(found) for name, found in (*own.phases.items(), ("first_token", first))},
        "choose": report.spread(own.phases["choose"]),
        "added": report.spread(added),
        "prefill": report.ratio(whole.phases["prefill"], own.phases["prefill"]),
        "first_token": report.ratio(whole.sum_of(*_VISION, "prefill"), first),
        "of_bare": report.spread([(a / b) / (c / d) for a, b, c, d in gains]),
    }


_VISION = ("encode", "choose")
_COLUMNS: Columns = (
    ("way", lambda row: row["way"]),
    ("tokens", lambda row: str(row["visual_tokens"])),
    ("encode", lambda row: f"{row['seconds']['encode']['median'] * 1e3:.0f} ms"),
    ("choose", lambda row: f"{row['choose']['median'] * 1e3:.1f} ms"),
    ("adds", lambda row: f"{row['added']['median'] * 1e3:.1f} ms"),
    ("prefill", lambda row: f"{row['seconds']['prefill']['median'] * 1e3:.0f} ms"),
    ("first token", lambda row: f"{row['seconds']['first_token']['median'] * 1e3:.0f} ms"),
    ("prefill x", lambda row: f"{row['prefill']['median']:.2f}"),
    ("first token x", lambda row: f"{row['first_token']['median']:.2f}"),
    ("quartiles", lambda row: report.quartiles(row["first_token"]["quartiles"])),
    ("of bare", lambda row: f"{row['of_bare']['median']:.3f}"),
)


def _inputs(model: Any, args: argparse.Namespace, share: float) -> dict[str, Tensor]:
    """One image at a share of its tokens, and text, as the processor gives them."""
    vision = model.config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    side = round(args.image_size / (merge * patch))
    rows = max(1, round(side * share**0.5))
    columns = max(1, round(share * side * side / rows))
    frames = vision.temporal_patch_size
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows * columns * merge**2, 3 * frames * patch**2, generator=noise)
    image = model.config.image_token_id
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id
    ids = torch.tensor([[start, *[image] * (rows * columns), end, *range(10, 10 + args.text_tokens)]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).int(),
        "pixel_values": pixels.to(model.dtype),
        "image_grid_thw": torch.tensor([[1, rows * merge, columns * merge]]),
    }
    return {name: value.to(args.device) for name, value in inputs.items()}


def _pass(model: Any, inputs: dict[str, Tensor], device: str) -> Clock:
    """From pixels to the first logits; marks the end of the encoder, of choosing, and of the language model."""
    clock = Clock(device)
    with _marked(model.model.visual, clock, None, "encode"), _marked(model.model.language_model, clock, "choose", None):
        model(**inputs, logits_to_keep=1)
    clock.mark("prefill")
    return clock


@contextmanager
def _marked(module: nn.Module, clock: Clock, before: str | None, after: str | None) -> Iterator[None]:
    handles = []
    if before:
        handles.append(module.register_forward_pre_hook(lambda *call: clock.mark(before)))
    if after:
        handles.append(module.register_forward_hook(lambda *call: clock.mark(after)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bare(model: Any, length: int, device: str) -> None:
    """The language model alone, on as many embeddings, and the logits of the last."""
    embeds = torch.zeros(1, length, model.config.text_config.hidden_size, dtype=model.dtype, device=device)
    states = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    model.lm_head(states[:, -1:])


def add_families_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip benchmark families``."""
    parser.add_argument("--model", choices=MODELS, default="qwen3-vl", help="scaled model of random weights")
    parser.add_argument("--keep", type=finite, nargs="+", default=[0.5, 0.25], metavar="SHARE", help="shares to keep")
    parser.add_argument("--image-size", type=positive, default=1024, metavar="PIXELS", help="edge of the image")
    parser.add_argument("--text-tokens", type=positive, default=60, metavar="N", help="text tokens of the prompt")
    add_measuring_arguments(parser, 3, "bfloat16" if torch.cuda.is_available() else "float32")
    parser.set_defaults(run=benchmark_families)

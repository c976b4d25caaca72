"""Qwen-VL models of transformers with random weights, and what their answers take with fewer visual tokens.

Phases are those of :mod:`llava.measure.meters.runner`, without a projector's: "tower" is the encoder with its merger,
"layout" all between it and the language model, the choice of tokens included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from llava.measure.meters.peak import peak_of
from llava.measure.meters.runner import Watch
from llava.measure.meters.timing import Measurement, time_interleaved
from llava.measure.models.shapes import random_model
from llava.measure.report import Row, ratio, spread
from visionzip import unzip, visionzip
from visionzip.integrations import family_of

FIRST_TOKEN = ("tower", "layout", "prefill")  # from pixels to the first token's logits


@dataclass(frozen=True)
class QwenShape:
    """A Qwen-VL model without its weights.

    Attributes:
        name: of its class, before ``ForConditionalGeneration``.
        text: the language model's config.
        vision: the encoder's.
        tokens: ids of an image, a video, and of the start and the end of either.
    """

    name: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tokens: tuple[int, int, int, int] = (151655, 151656, 151652, 151653)

    def config(self) -> Any:
        """The config of transformers."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        own = {"text_config": dict(self.text), "vision_config": dict(self.vision)}
        return getattr(transformers, f"{self.name}Config")(**own, **dict(zip(names, self.tokens, strict=True)))


def _rope(sections: list[int], theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}


_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
_TINY |= {"num_key_value_heads": 2, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_TINY_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64}
_TINY_TOKENS = (3, 4, 5, 6)
# As the configs of Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen3-VL-8B-Instruct have them.
SHAPES: dict[str, QwenShape] = {
    "qwen2.5-vl-7b": QwenShape(
        "Qwen2_5_VL",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": _rope([16, 24, 24], 1e6),
        },
        {"hidden_size": 1280, "out_hidden_size": 3584},
    ),
    "qwen3-vl-8b": QwenShape(
        "Qwen3VL",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rope_parameters": _rope([24, 20, 20], 5e6, mrope_interleaved=True),
        },
        {"out_hidden_size": 4096},
    ),
    "qwen2.5-vl-tiny": QwenShape(
        "Qwen2_5_VL",
        {**_TINY, "rope_parameters": _rope([2, 3, 3], 1e4)},
        {**_TINY_VISION, "fullatt_block_indexes": [0, 2]},
        _TINY_TOKENS,
    ),
    "qwen3-vl-tiny": QwenShape(
        "Qwen3VL",
        {**_TINY, "head_dim": 16, "rope_parameters": _rope([4, 2, 2], 1e4, mrope_interleaved=True)},
        {**_TINY_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        _TINY_TOKENS,
    ),
}


def build_qwen(name: str, device: str, dtype: torch.dtype) -> Any:
    """Build a model of a key of :data:`SHAPES`; it never says a picture's placeholder, as no trained one does."""
    shape = SHAPES[name]
    model = random_model(getattr(transformers, f"{shape.name}ForConditionalGeneration"), shape.config(), device, dtype)
    model.generation_config.update(pad_token_id=0, suppress_tokens=list(shape.tokens))
    return model


@dataclass(frozen=True)
class Share:
    """A method at a share of an image's tokens.

    Attributes:
        method: its name; ``vanilla`` keeps all, ``resize`` makes the picture smaller.
        keep: the share.
    """

    method: str
    keep: float = 1.0

    @property
    def name(self) -> str:
        """``vanilla`` or ``visionzip-0.25``."""
        return self.method if self.keep == 1 else f"{self.method}-{self.keep:g}"

    def attach(self, model: Any) -> None:
        """Put it on a model, in the place of what is there."""
        unzip(model)
        if self.method not in ("vanilla", "resize"):
            visionzip(model, keep=self.keep, method=self.method)

    def inputs(self, model: Any, size: tuple[int, int], batch: int, text_tokens: int) -> dict[str, Tensor]:
        """Make the prompts for it, of images of some (width, height)."""
        return make_inputs(model, size, batch, text_tokens, self.keep if self.method == "resize" else 1.0)


def grid_of(model: Any, size: tuple[int, int], share: float = 1.0) -> tuple[int, int]:
    """Rows and columns of patches of an image (width, height), scaled to a share of its tokens."""
    vision = model.config.vision_config
    edge = vision.patch_size * vision.spatial_merge_size
    rows, columns = (max(1, round(length * math.sqrt(share) / edge)) for length in reversed(size))
    return rows * vision.spatial_merge_size, columns * vision.spatial_merge_size


def make_inputs(
    model: Any, size: tuple[int, int], batch: int, text_tokens: int, share: float = 1.0
) -> dict[str, Tensor]:
    """Make prompts as the stock processor does: the same random words around an image of noise each.

    Args:
        model: from :func:`build_qwen`.
        size: (width, height) of the images, pixels.
        batch: prompts.
        text_tokens: of each, with the two around the image.
        share: the image is scaled to this share of its tokens.
    """
    config, vision = model.config, model.config.vision_config
    device, (rows, columns) = model.device, grid_of(model, size, share)
    image = [config.image_token_id] * (rows * columns // vision.spatial_merge_size**2)
    words = torch.randint(7, min(config.text_config.vocab_size, 150000), (text_tokens - 2,)).tolist()
    before = len(words) // 2
    row = [*words[:before], config.vision_start_token_id, *image, config.vision_end_token_id, *words[before:]]
    ids = torch.tensor([row] * batch, device=device)
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(batch * rows * columns, width, device=device, dtype=model.dtype),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * batch, device=device),
    }


def answer(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> Watch:
    """Call ``generate`` with whatever is on the model; its phases are marked."""
    language_model = family_of(model).language_model(model)
    watch = Watch(model.device, None)
    handles = [
        model.model.visual.register_forward_hook(lambda *_: watch.mark("tower")),
        language_model.register_forward_pre_hook(watch.before_forward, with_kwargs=True),
        language_model.register_forward_hook(watch.after_forward),
    ]
    try:
        model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        watch.mark("decode")
    finally:
        for handle in handles:
            handle.remove()
    return watch


def measure_qwen(
    model: Any,
    size: tuple[int, int],
    batch: int,
    shares: Sequence[Share],
    rounds: int,
    new_tokens: int,
    text_tokens: int = 60,
) -> list[Row]:
    """Time some methods in interleaved rounds, and measure the peak memory of each.

    Args:
        model: from :func:`build_qwen`.
        size: (width, height) of the images, pixels.
        batch: prompts at a time.
        shares: the first is ``vanilla``, to which the others are compared.
        rounds: how often.
        new_tokens: of each answer.
        text_tokens: of each prompt.

    Returns:
        A row of each, with the fields that rows of :func:`llava.measure.latency.make_rows` have for the same.
    """
    device = str(model.device)
    inputs = {share.name: share.inputs(model, size, batch, text_tokens) for share in shares}
    by_name = {share.name: share for share in shares}
    ways = {name: partial(answer, model, own, new_tokens) for name, own in inputs.items()}
    timed = time_interleaved(ways, device, rounds, "time", lambda name: by_name[name].attach(model))
    rows = [_row(by_name[name], own, timed["vanilla"], batch, text_tokens, new_tokens) for name, own in timed.items()]
    for row in rows:
        by_name[row["way"]].attach(model)
        with torch.inference_mode():
            row["memory_mib"] = peak_of(ways[row["way"]], device)[1]
        row["image"] = f"{size[0]} x {size[1]}"
    unzip(model)
    return rows


def _row(share: Share, own: Measurement, base: Measurement, batch: int, text_tokens: int, new_tokens: int) -> Row:
    watch: Watch = own.last
    decoded = batch * (new_tokens - 1)
    return {
        "way": share.name,
        "method": share.method,
        "keep": share.keep,
        "batch": batch,
        "visual_tokens": watch.prompt_tokens - text_tokens,
        "prompt_tokens": watch.prompt_tokens,
        "seconds": {
            **{phase: spread(found) for phase, found in own.phases.items()},
            "first_token": spread(own.sum_of(*FIRST_TOKEN)),
            "total": spread(own.total),
        },
        "speed_up": {
            "prefill": ratio(base.phases["prefill"], own.phases["prefill"]),
            "first_token": ratio(base.sum_of(*FIRST_TOKEN), own.sum_of(*FIRST_TOKEN)),
            "decode": ratio(base.phases["decode"], own.phases["decode"]),
            "total": ratio(base.total, own.total),
        },
        "tokens_per_second": spread([decoded / seconds for seconds in own.phases["decode"]]),
        "kv_cache_mib": watch.cache_bytes / 2**20,
    }

"""Scores of image encoders by each attention kernel, beside those by eager attention: they must choose the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.utils import is_flash_attn_2_available

from llava.measure.meters.peak import Request
from llava.measure.models.qwen import SHAPES
from llava.measure.models.shapes import random_model
from llava.measure.report import Row
from llava.measure.tower import build_tower
from visionzip.attention import patch_scores, read_attention, read_packed_attention

CLOSE = 1e-3  # in float32
_ENCODERS = {"Qwen2_5_VL": Qwen2_5_VisionTransformerPretrainedModel, "Qwen3VL": Qwen3VLVisionModel}
Scores = Callable[[], Tensor]


def kernels(device: str, dtype: torch.dtype) -> list[str]:
    """Name the kernels that run here, ``eager`` apart."""
    flash = device.startswith("cuda") and dtype != torch.float32 and is_flash_attn_2_available()
    return ["sdpa", *(["flash_attention_2"] if flash else [])]


@torch.inference_mode()
def measure_kernels(request: Request) -> Iterator[Row]:
    """Compare the scores of patches, kernel by kernel.

    Args:
        request: ``encoders`` (``clip``, of size ``tower``, and keys of :data:`llava.measure.models.qwen.SHAPES`), the
            ``edge`` of the Qwens' image in pixels, ``dtypes`` and ``device``.

    Yields:
        A row of each encoder and kernel: ``patches``, the largest ``difference`` of scores in units of the mean score,
        and the share of the best quarter by eager attention that is in the ``same_quarter`` by this kernel.

    Raises:
        RuntimeError: scores in float32 differ by more than :data:`CLOSE`; half-precision ones are to be judged by eye.
    """
    device, far = request["device"], []
    for name, dtype in itertools.product(request["encoders"], request["dtypes"]):
        torch.manual_seed(0)
        if name == "clip":
            model, scores = _clip(request["tower"], device, getattr(torch, dtype))
        else:
            model, scores = _qwen(name, request["edge"], device, getattr(torch, dtype))
        _sharpen(model)
        model.set_attn_implementation("eager")
        expected = scores()
        for kernel in kernels(device, getattr(torch, dtype)):
            model.set_attn_implementation(kernel)
            row = {"encoder": name, "kernel": kernel, "dtype": dtype, **_compare(scores(), expected)}
            yield row
            if dtype == "float32" and not row["difference"] <= CLOSE:
                far.append(f"{name} with {kernel}: scores differ by {row['difference']:.2g} of their mean from eager's")
    if far:
        raise RuntimeError("; ".join(far))


def _sharpen(encoder: Any) -> None:
    """Make the attention of random weights as uneven as a trained encoder's."""
    for name, weight in encoder.named_parameters():
        if any(part in name for part in ("qkv.weight", "q_proj.weight", "k_proj.weight")):
            weight.mul_(2)


def _compare(found: Tensor, expected: Tensor) -> Row:
    quarter = max(1, len(expected) // 4)
    ours, theirs = (set(scores.topk(quarter).indices.tolist()) for scores in (found, expected))
    difference = (found - expected).abs().max() / expected.mean()
    same = len(ours & theirs) / quarter
    return {"patches": len(expected), "difference": difference.item(), "same_quarter": same}


def _clip(size: str, device: str, dtype: torch.dtype) -> tuple[Any, Scores]:
    encoder = build_tower(size, device, dtype).encoder
    edge = encoder.config.image_size
    images = torch.randn(1, 3, edge, edge, device=device, dtype=dtype)

    def scores() -> Tensor:
        with read_attention(encoder.encoder.layers[-2].self_attn, partial(patch_scores, cls_token=True)) as reader:
            encoder(images)
        return reader.result()[0]

    return encoder, scores


def _qwen(name: str, edge: int, device: str, dtype: torch.dtype) -> tuple[Any, Scores]:
    config = SHAPES[name].config().vision_config
    encoder = random_model(_ENCODERS[SHAPES[name].name], config, device, dtype)
    unit = config.patch_size * config.spatial_merge_size
    side = round(edge / unit) * config.spatial_merge_size
    width = 3 * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(side * side, width, device=device, dtype=dtype)
    grid = torch.tensor([[1, side, side]], device=device)
    layer = getattr(config, "fullatt_block_indexes", [-1])[-1]

    def scores() -> Tensor:
        with read_packed_attention(encoder.blocks[layer].attn) as found:
            encoder(pixels, grid)
        return found[0][0]

    return encoder, scores

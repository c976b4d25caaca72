"""LanguageBind's encoders the obvious way: the released arithmetic on a checkpoint's weights, one step a line."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def attend(weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention within each row of x (B, S, D): its output, its matrix (B, H, S, S), and its keys (B, S, H, Dh)."""
    queries, keys, values = (linear(weights, f"{name}.{key}_proj", x).unflatten(-1, (4, -1)) for key in "qkv")
    matrix = torch.einsum("bqhd,bkhd->bhqk", queries, keys).div(queries.shape[-1] ** 0.5).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", matrix, values).flatten(2)
    return linear(weights, f"{name}.out_proj", mixed), matrix, keys


def encode(weights: Weights, pixels: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (T, 3, h, w) through the first 3 of 4 layers; attention over time within windows of frames, if any.

    Returns the hidden states (T, S, D), and the attention and the keys of the last of these layers.
    """
    patches = F.conv2d(pixels, weights["embeddings.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    cls = weights["embeddings.class_embedding"].expand(len(pixels), 1, -1)
    hidden = torch.cat([cls, patches], dim=1) + weights["embeddings.position_embedding.weight"]
    hidden = norm(weights, "pre_layrnorm", hidden)
    for number in range(3):
        layer = {
            key.removeprefix(f"encoder.layers.{number}."): value
            for key, value in weights.items()
            if key.startswith(f"encoder.layers.{number}.")
        }
        if window is not None:
            parts = []
            for start in range(0, len(hidden), window):
                part = hidden[start : start + window]
                part = part + layer["temporal_embedding"][0, : len(part), None]
                over_time, _, _ = attend(
                    layer, "temporal_attn", norm(layer, "temporal_layer_norm1", part).transpose(0, 1)
                )
                parts.append(part + over_time.transpose(0, 1))
            hidden = torch.cat(parts)
        over_space, matrix, keys = attend(layer, "self_attn", norm(layer, "layer_norm1", hidden))
        hidden = hidden + over_space
        inner = linear(layer, "mlp.fc1", norm(layer, "layer_norm2", hidden))
        hidden = hidden + linear(layer, "mlp.fc2", F.gelu(inner))  # not CLIP's quick_gelu
    return hidden, matrix, keys


def project(weights: Weights, tokens: Tensor) -> Tensor:
    inner = F.gelu(linear(weights, "model.mm_projector.0", tokens))
    return linear(weights, "model.mm_projector.2", inner)


def tower_weights(folder: Path, kind: str) -> Weights:
    prefix = f"model.{kind}_tower.{kind}_tower."
    weights = load_file(folder / "model.safetensors")
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

"""Runs an image encoder of transformers up to the layer that VisionZip scores, and compresses what comes out.

For CLIP and SigLIP encoders, wherever they stand: in LLaVA's tower here and in transformers' own models. No layer
behind the scored one is run, and all run the user's attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionzip.attention import QueriesKeys, merge_keys, patch_scores, read_attention
from visionzip.compress import CompressedTokens, compress_tokens
from visionzip.config import VisionZipConfig


class ScoredTokens(NamedTuple):
    """What :func:`compress_tokens` needs of B images of S tokens.

    Attributes:
        hidden_states: (B, S, D) output of the scored layer.
        scores: (B, N) float32, attention on each patch; N = S - 1 with a CLS token, else S.
        keys: (B, S, Dk) float32, keys averaged over heads.
    """

    hidden_states: Tensor
    scores: Tensor
    keys: Tensor


def check_finite(batch: Tensor, counts: Sequence[int], name: str = "images") -> None:
    """Check that pixels are normalised numbers: of a floating type, none NaN or infinite.

    Args:
        batch: (tiles, …), the tiles of all images.
        counts: how many tiles each image has.
        name: of the argument that the images are in.

    Raises:
        ValueError: they are not; the message names the image.
    """
    if not batch.is_floating_point():
        raise ValueError(
            f"{name} are {batch.dtype}: raw pixels are not normalised, prepare them with the model's image processor "
            "(llava.mm_utils.process_images)"
        )
    if torch.isfinite(batch).all():
        return
    for index, image in enumerate(batch.split(list(counts))):
        if wrong := int((~torch.isfinite(image)).sum()):
            raise ValueError(
                f"{name}[{index}] has {wrong} pixels that are NaN or infinite, of {image.numel()}: check how it was "
                "decoded and normalised"
            )


def has_cls_token(vision_model: nn.Module) -> bool:
    """Whether position 0 is a CLS token (CLIP has one, SigLIP has none)."""
    return hasattr(vision_model.embeddings, "class_embedding")


def layers_needed(vision_model: nn.Module, layer: int) -> int:
    """How many encoder layers have to run for the output of ``layer``.

    Args:
        vision_model: the encoder.
        layer: :attr:`VisionZipConfig.layer`.

    Raises:
        ValueError: the encoder has no such layer.
    """
    layers = vision_model.config.num_hidden_layers  # not of the module: training from a cache drops its layers
    if not -layers <= layer < layers:
        raise ValueError(f"layer={layer} is outside the vision tower's {layers} layers (-{layers} to {layers - 1})")
    return layer % layers + 1


def hidden_states(vision_model: nn.Module, pixel_values: Tensor, layers: int, **layer_kwargs: Any) -> Tensor:
    """Output (B, S, D) of the first ``layers`` encoder layers; the ones behind them are not run.

    Args:
        vision_model: transformers' ``CLIPVisionModel`` or ``SiglipVisionModel``.
        pixel_values: (B, 3, h, w) on any device, in any floating type.
        layers: 0 for the embeddings alone.
        **layer_kwargs: for each layer (``frames`` of one that attends over time).
    """
    weight = vision_model.embeddings.patch_embedding.weight
    # Offloaded weights are on "meta" until accelerate's hooks bring them in; then these move the pixels too.
    device = pixel_values.device if weight.is_meta else weight.device
    states = vision_model.embeddings(pixel_values.to(device=device, dtype=weight.dtype))
    if (norm := getattr(vision_model, "pre_layrnorm", None)) is not None:  # CLIP's, spelt like that
        states = norm(states)
    for layer in vision_model.encoder.layers[:layers]:
        states = layer(states, None, **layer_kwargs)
    return states


@torch.compiler.disable  # hooks that come and go cannot be traced; a compiled model runs this part as it is
def score_images(vision_model: nn.Module, pixel_values: Tensor, layer: int, **layer_kwargs: Any) -> ScoredTokens:
    """Tokens of one encoder layer with the scores and keys by which they are compressed.

    Args:
        vision_model: as in :func:`hidden_states`.
        pixel_values: (B, 3, h, w).
        layer: :attr:`VisionZipConfig.layer`.
        **layer_kwargs: as in :func:`hidden_states`.

    Raises:
        ValueError: the encoder has no such layer.
    """
    layers = layers_needed(vision_model, layer)
    cls_token = has_cls_token(vision_model)

    def summarize(read: QueriesKeys) -> tuple[Tensor, Tensor]:
        return patch_scores(read, cls_token), merge_keys(read)

    with read_attention(vision_model.encoder.layers[layers - 1].self_attn, summarize) as reader:
        states = hidden_states(vision_model, pixel_values, layers, **layer_kwargs)
    return ScoredTokens(states, *reader.result())


def compress_images(
    vision_model: nn.Module, pixel_values: Tensor, config: VisionZipConfig, **layer_kwargs: Any
) -> CompressedTokens:
    """Visual tokens of images, before the projector, with what was kept and merged.

    Args:
        vision_model: as in :func:`hidden_states`.
        pixel_values: (B, 3, h, w).
        config: the setting.
        **layer_kwargs: as in :func:`hidden_states`.

    Raises:
        ValueError: the encoder has no such layer.
    """
    return compress_tokens(
        *score_images(vision_model, pixel_values, config.layer, **layer_kwargs),
        config.dominant,
        config.contextual,
        cls_token=has_cls_token(vision_model),
        merge=config.merge,
    )

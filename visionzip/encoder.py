"""Runs an image encoder of transformers up to the layer that VisionZip scores, and compresses what comes out.

For CLIP and SigLIP encoders, wherever they stand: in LLaVA's tower here and in transformers' own models. No layer
behind the scored one is run, and all run the user's attention kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.attention import QueriesKeys, merge_keys, patch_scores, read_attention
from visionzip.compress import CompressedTokens, group_sizes
from visionzip.config import VisionZipConfig
from visionzip.methods import EncoderRead, has_size_bias, method_of
from visionzip.methods.base import Reads


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


def check_tokens(tokens: Sequence[Tensor], name: str = "images") -> None:
    """Check visual tokens that go to a language model, which would answer NaN with the token of number 0.

    They are looked at once for a call, when they are made, not once a step; and not in training, where a step of mixed
    precision may overflow, which its scaler answers.

    Args:
        tokens: (n, D) of each image.
        name: of what they were made of.

    Raises:
        ValueError: some are NaN or infinite; the message names the image.
    """
    if torch.compiler.is_compiling() or torch.isfinite(torch.cat(list(tokens)).detach()).all():
        return
    index, own = next((index, own) for index, own in enumerate(tokens) if not torch.isfinite(own).all())
    wrong = int((~torch.isfinite(own)).any(dim=-1).sum())
    raise ValueError(
        f"{name}[{index}] has {wrong} visual tokens that are NaN or infinite, of {len(own)}, as the model's encoder or "
        f"projector made them: its weights are damaged, or {own.dtype} is too small for them (load the model in "
        "bfloat16 or float32)"
    )


def has_cls_token(vision_model: nn.Module) -> bool:
    """Whether position 0 is a CLS token (CLIP has one, SigLIP has none)."""
    return hasattr(vision_model.embeddings, "class_embedding")


def side_length(vision_model: nn.Module) -> int:
    """Patches along the edge of an image."""
    return vision_model.config.image_size // vision_model.config.patch_size


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
def read_encoder(
    vision_model: nn.Module,
    pixel_values: Tensor,
    config: VisionZipConfig,
    run: Callable[..., Tensor] = hidden_states,
    **layer_kwargs: Any,
) -> EncoderRead:
    """Run an encoder to the scored layer and read what the setting's method asks for, but what is behind a projector.

    Args:
        vision_model: as in :func:`hidden_states`.
        pixel_values: (B, 3, h, w).
        config: the setting.
        run: runs it, with the arguments of :func:`hidden_states`; that is for encoders of transformers.
        **layer_kwargs: as in :func:`hidden_states`.

    Raises:
        ValueError: the encoder has no such layer, or the method is unknown.
    """
    reads = reads_of(config)
    layers = layers_needed(vision_model, config.layer)
    cls_token = has_cls_token(vision_model)
    facts = {"cls_token": cls_token, "pixels": pixel_values, "grid": (side_length(vision_model),) * 2}
    if not reads & {"scores", "keys"}:  # no hook where nothing is read
        return EncoderRead(run(vision_model, pixel_values, layers, **layer_kwargs), **facts)
    summarize = partial(scores_and_keys, reads=reads, cls_token=cls_token)
    with read_attention(vision_model.encoder.layers[layers - 1].self_attn, summarize) as reader:
        states = run(vision_model, pixel_values, layers, **layer_kwargs)
    return EncoderRead(states, scores=reader.result()[0], keys=reader.result()[1], **facts)


def reads_of(config: VisionZipConfig) -> frozenset[Reads]:
    """Say what a setting needs of the encoder: what its method reads, and the keys where tokens have sizes."""
    return method_of(config).reads | ({"keys"} if has_size_bias(config) else set())


def scores_and_keys(
    read: QueriesKeys, reads: Collection[Reads], cls_token: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute of the scored layer's attention what is read of it: scores (B, N) and keys (B, S, Dk), each or None."""
    scores = patch_scores(read, cls_token) if "scores" in reads else None
    return scores, merge_keys(read) if "keys" in reads else None


def choose_tokens(
    read: EncoderRead, config: VisionZipConfig, project: Callable[[Tensor], Tensor] | None = None
) -> CompressedTokens:
    """Compress what was read of an encoder: the one stage that every model family goes through.

    Args:
        read: of B images of S tokens.
        config: the setting.
        project: the model's projector, (B, N, D) to (B, N, P), for methods that choose by what is behind it; not needed
            where ``read.projected`` is there.

    Raises:
        ValueError: the method reads projected patches, and there is no projector.
    """
    method = method_of(config)
    if "projected" in method.reads and read.projected is None:
        if project is None:
            raise ValueError(
                f"method={config.method!r} chooses by patches behind the projector, which a vision tower alone does "
                "not have: run it in a model"
            )
        with torch.no_grad():  # they only choose
            projected = project(read.patches).to(read.hidden_states.device)
            read = dataclasses.replace(read, projected=projected)
    chosen = method.choose(read, method.counts(config, read.patches.shape[1], read.cls_token), config)
    if has_size_bias(config):
        with torch.no_grad():
            return chosen._replace(sizes=group_sizes(read.keys, chosen.kept, read.cls_token))
    return chosen


def compress_images(
    vision_model: nn.Module,
    pixel_values: Tensor,
    config: VisionZipConfig,
    project: Callable[[Tensor], Tensor] | None = None,
    **layer_kwargs: Any,
) -> CompressedTokens:
    """Visual tokens of images, before the projector, with what was kept and merged.

    Args:
        vision_model: as in :func:`hidden_states`.
        pixel_values: (B, 3, h, w).
        config: the setting.
        project: as in :func:`choose_tokens`.
        **layer_kwargs: as in :func:`hidden_states`.

    Raises:
        ValueError: the encoder has no such layer, or what :func:`choose_tokens` raises.
    """
    return choose_tokens(read_encoder(vision_model, pixel_values, config, **layer_kwargs), config, project)

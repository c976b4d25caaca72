"""Run an image encoder up to the scored layer, and choose among its tokens: the one stage of every model family.

The encoder is transformers' CLIP or SigLIP, in LLaVA's vision tower of this repository or in a model of transformers.
No layer after the scored one runs, and every layer keeps the user's attention kernel.
"""

from __future__ import annotations

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
    """Check that pixels have a floating type, as normalised ones do, and that none is NaN or infinite.

    Args:
        batch: (tiles, …), the tiles of all images one after the other.
        counts: how many tiles each image has.
        name: the name of the argument that has the images, for the message.

    Raises:
        ValueError: the pixels fail a check; the message names the image.
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
    """Check that visual tokens are finite: with NaN, a language model would answer with the token of number 0.

    Tokens are checked once when they are made, and not in every step of decoding. They are not checked in training:
    there a step in mixed precision may overflow, and the gradient scaler handles it.

    Args:
        tokens: (n, D) of each image.
        name: what the tokens were made from, for the message.

    Raises:
        ValueError: a token is NaN or infinite; the message names the image.
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
    """Say whether the encoder has a CLS token at position 0: CLIP does, SigLIP does not."""
    return hasattr(vision_model.embeddings, "class_embedding")


def side_length(vision_model: nn.Module) -> int:
    """Count the patches along one edge of the encoder's square input."""
    return int(vision_model.config.image_size // vision_model.config.patch_size)


def layers_needed(vision_model: nn.Module, layer: int) -> int:
    """Count the encoder layers that have to run for the output of ``layer``.

    Args:
        vision_model: transformers' ``CLIPVisionModel`` or ``SiglipVisionModel``.
        layer: :attr:`VisionZipConfig.layer`; negative ones count from the end.

    Raises:
        ValueError: the encoder has no such layer.
    """
    layers = int(vision_model.config.num_hidden_layers)  # the module may have fewer: training from a cache drops them
    if not -layers <= layer < layers:
        raise ValueError(f"layer={layer} is outside the vision tower's {layers} layers (-{layers} to {layers - 1})")
    return layer % layers + 1


def hidden_states(vision_model: nn.Module, pixel_values: Tensor, layers: int, **layer_kwargs: Any) -> Tensor:
    """Run the first ``layers`` layers of an encoder and return their output (B, S, D).

    Args:
        vision_model: transformers' ``CLIPVisionModel`` or ``SiglipVisionModel``.
        pixel_values: (B, 3, h, w) on any device, in any floating type.
        layers: how many layers run; 0 returns the embeddings.
        **layer_kwargs: arguments that every layer gets, such as ``frames`` of layers that attend over time.
    """
    weight = vision_model.embeddings.patch_embedding.weight
    # Offloaded weights are on "meta" until accelerate's hooks bring them in; then these move the pixels too.
    device = pixel_values.device if weight.is_meta else weight.device
    states = vision_model.embeddings(pixel_values.to(device=device, dtype=weight.dtype))
    if (norm := getattr(vision_model, "pre_layrnorm", None)) is not None:  # CLIP has this attribute, spelt like that
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
    """Run an encoder up to the scored layer and read what the setting's method needs.

    The projected patches are not read here, as the encoder does not know the projector: :func:`choose_tokens` computes
    them.

    Args:
        vision_model: transformers' ``CLIPVisionModel`` or ``SiglipVisionModel``.
        pixel_values: (B, 3, h, w).
        config: the setting.
        run: runs the encoder; a function with the arguments of :func:`hidden_states`, for encoders that run another
            way (vLLM's).
        **layer_kwargs: arguments that every layer gets.

    Raises:
        ValueError: the encoder has no such layer, or the method is unknown.
    """
    reads = reads_of(config)
    layers = layers_needed(vision_model, config.layer)
    cls_token = has_cls_token(vision_model)
    grid = (side_length(vision_model), side_length(vision_model))
    if not reads & {"scores", "keys"}:  # without hooks, as the attention is not needed
        states = run(vision_model, pixel_values, layers, **layer_kwargs)
        return EncoderRead(states, cls_token, pixels=pixel_values, grid=grid)
    summarize = partial(scores_and_keys, reads=reads, cls_token=cls_token)
    with read_attention(vision_model.encoder.layers[layers - 1].self_attn, summarize) as reader:
        states = run(vision_model, pixel_values, layers, **layer_kwargs)
    scores, keys = reader.result()
    return EncoderRead(states, cls_token, scores, keys, pixels=pixel_values, grid=grid)


def reads_of(config: VisionZipConfig) -> frozenset[Reads]:
    """List what a setting reads from the encoder: what its method reads, and the keys if tokens have sizes."""
    sizes: frozenset[Reads] = frozenset({"keys"}) if has_size_bias(config) else frozenset()
    return method_of(config).reads | sizes


def scores_and_keys(
    read: QueriesKeys, reads: Collection[Reads], cls_token: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the scores (B, N) and the keys (B, S, Dk) of the scored layer, each None unless it is in ``reads``."""
    scores = patch_scores(read, cls_token) if "scores" in reads else None
    return scores, merge_keys(read) if "keys" in reads else None


def choose_tokens(
    read: EncoderRead, config: VisionZipConfig, project: Callable[[Tensor], Tensor] | None = None
) -> CompressedTokens:
    """Let the setting's method choose tokens from what was read: every model family goes through this function.

    Args:
        read: what was read from the encoder, for B images of S tokens.
        config: the setting.
        project: the model's projector, (B, N, D) to (B, N, P). Methods that read projected patches need it, unless
            ``read`` has them already.

    Returns:
        The tokens, with their sizes if the setting has a size bias.

    Raises:
        ValueError: the method reads projected patches, and there is no projector.
    """
    method = method_of(config)
    if "projected" in method.reads and not read.has("projected"):
        if project is None:
            raise ValueError(
                f"method={config.method!r} compares patches behind the projector, but a vision tower alone has no "
                "projector: apply visionzip to the whole model"
            )
        with torch.no_grad():  # projected patches only decide what is chosen, so they need no gradient
            read = read.replace(projected=project(read.patches).to(read.hidden_states.device))
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
    """Run an encoder on images and choose their visual tokens, which the projector has not seen yet.

    Args:
        vision_model: transformers' ``CLIPVisionModel`` or ``SiglipVisionModel``.
        pixel_values: (B, 3, h, w).
        config: the setting.
        project: the model's projector, as in :func:`choose_tokens`.
        **layer_kwargs: arguments that every layer gets.

    Raises:
        ValueError: the encoder has no such layer, or what :func:`choose_tokens` raises.
    """
    return choose_tokens(read_encoder(vision_model, pixel_values, config, **layer_kwargs), config, project)

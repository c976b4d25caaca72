"""Record what an encoder of the seam's families attends to, keeps and merges, token by token, for figures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from visionzip.apply import unwrap
from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens
from visionzip.integrations import family_of
from visionzip.integrations.huggingface import stock_features
from visionzip.integrations.seam.base import OutputFamily, SeamFamily
from visionzip.integrations.seam.choice import flat_tokens
from visionzip.methods import EncoderRead, method_of
from visionzip.token_map import TokenMap, roles_of

_OF_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "image_position_ids")
_CELL = 28  # the edge of a token in the figure, in pixels


@torch.inference_mode()
def inspect_picture(model: nn.Module, inputs: Mapping[str, Any], picture: Image.Image) -> TokenMap:
    """Run a model's encoder, and record the attention on each merged token and what becomes of it.

    Args:
        model: a model of the seam's families, zipped or not.
        inputs: what the processor returned for a prompt with one picture. Of a picture that is cut into tiles, the last
            tile counts, which shows the whole picture.
        picture: the picture itself.

    Returns:
        A map whose "patches" are the language model's tokens, and whose layers are those that compare all patches.

    Raises:
        TypeError: the model's encoder is CLIP or SigLIP, which :func:`visionzip.token_map.inspect_tokens` reads.
        ValueError: VisionZip does not know the model's encoder.
    """
    target = unwrap(model)
    family = _seam_family(target)
    base, zipped = target.model, getattr(target, "_visionzip", None)
    config: VisionZipConfig = zipped.config if zipped else family.default_config(target)
    layers = family.encoder.layers(base)
    given = _given(inputs)
    rows, columns = family.frames(base, given)[-1].size
    count = rows * columns
    with ExitStack() as stack:
        reads = [stack.enter_context(family.encoder.read(base, layer, given)) for layer in layers]
        features = flat_tokens(stock_features(base, "image", given | {"return_dict": True}).pooler_output)
        read = [own() for own in reads]
    attention = torch.stack([scores[-count:].float() for scores, _ in read])
    decides = layers.index(config.layer)
    roles = None
    if zipped:
        pixels = family.encoder.pixels(base, given, "pixel_values")
        own = pixels[-1]
        if isinstance(pixels, Tensor) and pixels.ndim == 2:  # packed: each token has several rows
            own = pixels[-count * (len(pixels) // len(features)) :]
        tokens, keys = features[None, -count:], read[decides][1][None, -count:]
        facts = EncoderRead(
            tokens,
            False,
            scores=attention[None, decides],
            keys=keys,
            projected=tokens,
            pixels=own[None],
            grid=(rows, columns),
        )
        (roles,) = roles_of(choose_tokens(facts, config), False)
    return TokenMap(
        _as_shown(picture, rows, columns),
        (rows, columns),
        attention.cpu() / attention.sum(dim=1, keepdim=True).cpu(),
        decides,
        False,
        roles,
        setting=zipped and config,
        method=zipped and method_of(config),
    )


@torch.inference_mode()
def token_pairs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Run a model's encoder, and record what its merged tokens attend to in the scored layer.

    A token stands for several patches: it pays what these pay on average, and is paid what they are paid in all.

    Args:
        model: a model of the seam's families, zipped or not.
        inputs: as :func:`inspect_picture` takes them.

    Returns:
        (N, N) float32 on the CPU, the attention that token i pays to token j, mean over heads. What patches pay to a
        CLS token, or to patches that are part of no token, is left out, so that rows sum to 1 or less.

    Raises:
        TypeError: the model's family is another one.
        ValueError: its encoder is read without pairs.
    """
    target = unwrap(model)
    family, base = _seam_family(target), target.model
    if family.encoder.pairs is None:
        raise ValueError(f"the encoder of {type(target).__name__} is read without what its patches pay to each other")
    zipped = getattr(target, "_visionzip", None)
    layer = (zipped.config if zipped else family.default_config(target)).layer
    given = _given(inputs)
    with family.encoder.pairs(base, layer, given) as found:
        stock_features(base, "image", given | {"return_dict": True})
        return found().cpu()


def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Select what an encoder takes of what a processor returned for a prompt with a picture."""
    return {name: inputs[name] for name in _OF_IMAGES if name in inputs}


def _seam_family(model: nn.Module) -> SeamFamily:
    """Return the family of a model, if VisionZip can read its encoder here.

    Raises:
        TypeError: it is a family of towers, or none.
        ValueError: VisionZip does not know its encoder.
    """
    family = family_of(model)
    if isinstance(family, SeamFamily):
        return family
    if isinstance(family, OutputFamily):
        raise ValueError(
            f"{type(model).__name__} has an encoder that VisionZip does not know, so its attention cannot be shown"
        )
    raise TypeError(f"the encoder of {type(model).__name__} is read by visionzip.token_map.inspect_tokens")


def _as_shown(picture: Image.Image, rows: int, columns: int) -> Tensor:
    """Resize a picture so that each token is a square of it: (h, w, 3), 0 to 1."""
    height, width = rows * _CELL, columns * _CELL
    data = bytearray(picture.convert("RGB").resize((width, height)).tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3).float() / 255

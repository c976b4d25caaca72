"""What an encoder behind transformers' seam looks at, keeps and merges, token by token, for figures of it."""

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
from visionzip.integrations.seam import SeamFamily
from visionzip.integrations.seam_choice import flat_tokens
from visionzip.methods import EncoderRead, method_of
from visionzip.token_map import TokenMap, roles_of

_OF_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "image_position_ids")
_CELL = 28  # pixels of a token in a picture


@torch.inference_mode()
def inspect_picture(model: nn.Module, inputs: Mapping[str, Any], picture: Image.Image) -> TokenMap:
    """Run a model's encoder and note the attention on each merged token and what becomes of it.

    Args:
        model: of a family behind the seam, zipped or not.
        inputs: what the processor made of a prompt with one picture. Of one that is cut into tiles the last one counts,
            which shows the whole picture.
        picture: it.

    Returns:
        A map whose "patches" are the language model's tokens, and whose layers are those that compare all of them.

    Raises:
        TypeError: the model is of another family.
        ValueError: nothing is known of its encoder.
    """
    target = unwrap(model)
    family = family_of(target)
    if not isinstance(family, SeamFamily):
        raise TypeError(f"{type(target).__name__} is of a family whose own encoder inspect_tokens reads")
    if family.encoder is None:
        raise ValueError(
            f"{type(target).__name__} has an encoder that VisionZip does not know, so its attention cannot be shown"
        )
    base, zipped = target.model, getattr(target, "_visionzip", None)
    config: VisionZipConfig = zipped.config if zipped else family.default_config(target)
    layers = family.encoder.layers(base)
    given = {name: inputs[name] for name in _OF_IMAGES if name in inputs}
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
        packed = isinstance(pixels, Tensor) and pixels.ndim == 2
        own = pixels[-count * (len(pixels) // len(features)) :] if packed else pixels[-1]
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
    shown = picture.convert("RGB").resize((columns * _CELL, rows * _CELL))
    image = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(rows * _CELL, columns * _CELL, 3)
    return TokenMap(
        image.float() / 255,
        (rows, columns),
        attention.cpu() / attention.sum(dim=1, keepdim=True).cpu(),
        decides,
        False,
        roles,
        setting=zipped and config,
        method=zipped and method_of(config),
    )

"""Compute how much each patch attends to each other patch (the paper's Figure 14), for a page or a figure."""

from __future__ import annotations

import base64

import torch
from torch import Tensor, nn

from visionzip.apply import unwrap
from visionzip.attention import QueriesKeys, patch_attention, read_attention
from visionzip.encoder import has_cls_token, hidden_states, layers_needed
from visionzip.integrations import find_integration


@torch.inference_mode()
def pair_attention(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model's image encoder up to the scored layer, and record what its patches attend to there.

    Args:
        model: a model of a family with a CLIP or SigLIP tower, zipped or not.
        images: (B, 3, h, w) from the model's image processor; tiles count as images of their own.

    Returns:
        (B, N, N) float32 on the CPU: the attention that patch i pays to patch j, mean over heads. What a patch pays to
        a CLS token is left out, so that rows sum to 1 or less.

    Raises:
        TypeError: the model's family is not supported.
        ValueError: the encoder is of another kind, or the images do not have its shape.
    """
    target = unwrap(model)
    integration = find_integration(target)
    encoder = integration.encoders(target)["image"]
    tower = encoder.vision_model
    pixels, over_time = encoder.inputs(images)
    layer = layers_needed(tower, (encoder.setting or integration.default(target)).layer)

    def on_patches(read: QueriesKeys) -> Tensor:
        return patch_attention(read, has_cls_token(tower))

    with read_attention(tower.encoder.layers[layer - 1].self_attn, on_patches) as reader:
        hidden_states(tower, pixels.to(tower.dtype), layer, **over_time)
    return reader.result().cpu()


def packed_pairs(attention: Tensor) -> str:
    """Encode an image's attention (N, N) as base64, one byte a pair: 255 * sqrt(attention / the highest of its row).

    The square root keeps small values apart: on a linear scale, most pairs would become 0.
    """
    shares = (attention / attention.amax(dim=1, keepdim=True)).sqrt()
    return base64.b64encode((shares * 255).round().to(torch.uint8).numpy().tobytes()).decode()

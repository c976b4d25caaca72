"""How much each patch attends to each other one (the paper's Figure 14), for a page or a figure to show."""

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
    """Run a model's image encoder up to the layer that decides, and note what its patches attend to there.

    Args:
        model: of a family with a CLIP or SigLIP tower, zipped or not.
        images: (B, 3, h, w), as the model's image processor makes them; tiles are images of their own.

    Returns:
        (B, N, N) float32 on the CPU: attention of patch i on patch j, mean over heads. What a patch pays to a CLS
        token is left out, so that rows sum to 1 or less.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: its encoder is of another kind, or the shape of the images is not the encoder's.
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
    """An image's (N, N) attention in a byte each, as base64: 255 * sqrt(attention / the highest of its row).

    Square roots: of most pairs there would be nothing left on a linear scale.
    """
    shares = (attention / attention.amax(dim=1, keepdim=True)).sqrt()
    return base64.b64encode((shares * 255).round().to(torch.uint8).numpy().tobytes()).decode()

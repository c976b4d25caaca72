"""Small Mini-Gemini checkpoints in exactly the original layout, and what such a model computes, written out.

A folder as ``YanweiLi/MGM-7B``, and its two towers in folders of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModel, ConvNextConfig, ConvNextModel

from checkpoints import CLIP, edit_config, edit_weights, scale_up, write_checkpoint
from llava.constants import IMAGE_TOKEN_INDEX

AUX_SIZE = 128  # 32 x 32 positions in the first map: 8 x 8 for each of the 4 x 4 patches of CLIP
PATCHES = 16
CONVNEXT = ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 2, 3, 1], layer_scale_init_value=0.5)
HD = {"image_grid": 2, "image_global": True, "image_size_aux": 2 * AUX_SIZE}
# transformers' names of ConvNeXt's modules, and OpenCLIP's.
_NAMES = {
    "embeddings.patch_embeddings.": "stem.0.",
    "embeddings.layernorm.": "stem.1.",
    "encoder.": "",
    "layers.": "blocks.",
    "downsampling_layer.": "downsample.",
    "dwconv.": "conv_dw.",
    "layernorm.": "norm.",
    "pwconv1.": "mlp.fc1.",
    "pwconv2.": "mlp.fc2.",
    "layer_scale_parameter": "gamma",
}


def convnext(seed: int = 0) -> ConvNextModel:
    """transformers' ConvNeXt, with random weights."""
    torch.manual_seed(seed)
    model = ConvNextModel(CONVNEXT)
    scale_up(model)
    for parameter in model.parameters():  # norms, biases and layer scales, which all begin alike
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(len(parameter))
    return model.eval()


def openclip_weights(model: ConvNextModel) -> dict[str, Tensor]:
    """The weights under OpenCLIP's names, with parts of it that Mini-Gemini leaves out."""
    weights = {"logit_scale": torch.ones(()), "visual.head.proj.weight": torch.ones(2, 2)}
    for key, value in model.state_dict().items():
        if key.startswith("layernorm."):  # behind the last stage
            weights[f"visual.trunk.head.{key.replace('layernorm', 'norm')}"] = value
            continue
        for name, other in _NAMES.items():
            key = key.replace(name, other)  # noqa: PLW2901
        weights[f"visual.trunk.{key}"] = value.clone()
    return weights


def write_mini_gemini(folder: Path, *, aux_inside: bool = False, **overrides: Any) -> Path:
    """A random checkpoint, its CLIP in ``folder-tower`` and its ConvNeXt in ``folder-aux``; returns ``folder``.

    Args:
        aux_inside: the checkpoint has the ConvNeXt's weights too.
        **overrides: fields of the config, or arguments of ``write_checkpoint``.
    """
    aux = folder.with_name(folder.name + "-aux")
    aux.mkdir(parents=True, exist_ok=True)
    found = openclip_weights(convnext())
    torch.save(found, aux / "open_clip_pytorch_model.bin")
    fields = {"image_size_aux": AUX_SIZE, "mm_hidden_size_aux": 60, **overrides}
    write_checkpoint(folder, **fields)
    edit_config(
        folder,
        "mm_patch_merge_type",
        "image_grid_pinpoints",
        model_type="mgm",
        architectures=["MGMLlamaForCausalLM"],
        mm_vision_tower_aux=str(aux),
    )
    new = {}
    for name, width in (("query", CLIP["hidden_size"]), ("aux", 60), ("val", 60)):
        prefix = f"model.vlm_uni_{name}_projector."
        new[prefix + "0.weight"] = 1 + 0.3 * torch.randn(width)
        new[prefix + "0.bias"] = 0.3 * torch.randn(width)
        new[prefix + "1.weight"] = 0.3 * torch.randn(CLIP["hidden_size"], width)
        new[prefix + "1.bias"] = 0.3 * torch.randn(CLIP["hidden_size"])
    if aux_inside:
        trunk = "visual.trunk."
        for key, value in found.items():
            if key.startswith((f"{trunk}stem.", f"{trunk}stages.")):
                new["model.vision_tower_aux.vision_" + key.removeprefix(trunk)] = value
    edit_weights(folder, lambda weights: weights | new)
    return folder


def pixels(count: int = 1, edge: int = AUX_SIZE, seed: int = 0) -> Tensor:
    """Images of noise, as the model takes them."""
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


# What a Mini-Gemini computes, written out plainly.


def clip_of(folder: Path) -> CLIPVisionModel:
    """transformers' CLIP with the checkpoint's own tower, and attention that can be read."""
    return CLIPVisionModel.from_pretrained(folder.with_name(folder.name + "-tower"), attn_implementation="eager").eval()


def plain_map(images: Tensor) -> Tensor:
    """All of ConvNeXt's stages at the first one's size: (B, 60, h / 4, w / 4)."""
    model = convnext()
    stages, maps = [], model.embeddings(images)
    for stage in model.encoder.stages:
        stages.append(maps := stage(maps))
    size = stages[0].shape[-2:]
    return torch.cat([F.interpolate(each, size, mode="bilinear", align_corners=False) for each in stages], dim=1)


def plain_mining(weights: dict[str, Tensor], tokens: Tensor, candidates: Tensor) -> Tensor:
    """One token (D,) and its sub-patches (P, C): attention with every projection written out."""

    def project(name: str, values: Tensor) -> Tensor:
        own = [weights[f"model.vlm_uni_{name}_projector.{key}"] for key in ("0.weight", "0.bias", "1.weight", "1.bias")]
        return F.linear(F.layer_norm(values, values.shape[-1:], own[0], own[1]), own[2], own[3])

    query, keys, values = project("query", tokens), project("aux", candidates), project("val", candidates)
    return (keys @ query / len(query) ** 0.5).softmax(dim=0) @ values


def square(features: Tensor, row: int, column: int, edge: int) -> Tensor:
    """The positions (edge * edge, C) of a square of a map (C, h, w)."""
    return features[:, row : row + edge, column : column + edge].flatten(1).T


def plain_projector(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The two linear layers in front of the language model."""
    own = [weights[f"model.mm_projector.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")]
    return F.linear(F.gelu(F.linear(tokens, own[0], own[1])), own[2], own[3])


def smaller(image: Tensor, edge: int) -> Tensor:
    """An image (3, h, w) in another resolution."""
    return F.interpolate(image[None], (edge, edge), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def plain_tokens(folder: Path, image: Tensor) -> Tensor:
    """Visual tokens (16, 32) of an image (3, 128, 128), as the paper has them."""
    weights = load_file(folder / "model.safetensors")
    features = clip_of(folder)(smaller(image, 56)[None], output_hidden_states=True).hidden_states[-2][0, 1:]
    high = plain_map(image[None])[0]
    mined = [plain_mining(weights, features[i], square(high, i // 4 * 8, i % 4 * 8, 8)) for i in range(PATCHES)]
    return plain_projector(weights, features + torch.stack(mined))


def prompt(*ids: int) -> Tensor:
    """A batch of one."""
    return torch.tensor([ids])


ASKED = prompt(1, 30, IMAGE_TOKEN_INDEX, 40, 50)

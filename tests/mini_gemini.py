"""Small Mini-Gemini checkpoints in exactly the original layout: a folder as ``YanweiLi/MGM-7B``, and its two towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ConvNextConfig, ConvNextModel

from checkpoints import CLIP, edit_config, edit_weights, scale_up, write_checkpoint

AUX_SIZE = 128  # 32 x 32 positions in the first map: 8 x 8 for each of the 4 x 4 patches of CLIP
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
    return model.eval()


def openclip_weights(model: ConvNextModel) -> dict[str, torch.Tensor]:
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

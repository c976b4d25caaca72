"""Zipped checkpoints of random weights, with heads as large as vLLM's kernels for CPUs need."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from hf_models import FAMILIES as LLAVAS
from hf_models import build, text_config
from seam_checkpoints import save_checkpoint
from seam_models import FAMILIES

from checkpoints import scale_up
from visionzip import visionzip


def write_llava(folder: Path, family: str, siglip: bool) -> Path:
    """Write a LLaVA of :mod:`hf_models`."""
    make, make_processor = LLAVAS[family]
    text = text_config(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    encoder = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"} if siglip else {}
    config = make(siglip).config
    config.text_config = text
    visionzip(build(type(make(siglip)), config), 4, 2).save_pretrained(folder)
    make_processor(**encoder).save_pretrained(folder)
    return folder


def write_qwen(folder: Path, family: str) -> Path:
    """Write a Qwen-VL of :mod:`seam_models`."""
    torch.manual_seed(0)
    config = FAMILIES[family].config()
    heads = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {**config.text_config.rope_parameters, "mrope_section": [6, 5, 5]}
    config.text_config.update({**heads, "vocab_size": 263, "rope_parameters": rope})
    config.vision_config.update({"hidden_size" if family == "qwen2_vl" else "out_hidden_size": 64})
    model = getattr(transformers, f"{FAMILIES[family].name}ForConditionalGeneration")(config).eval()
    scale_up(model)
    return save_checkpoint(family, folder, visionzip(model, keep=0.4))

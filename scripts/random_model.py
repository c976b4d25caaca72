"""A model of random weights with an embedded model's tokenizer, to measure servers with; usage in ``--help``."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


def write_random(source: str, folder: str, width: int, layers: int) -> None:
    """Write a LLaVA with LLaVA-1.5's grid of 576 patches, or a Qwen3-VL that has 576 tokens of a picture of 672 pixels.

    Args:
        source: llava-mini in transformers' layout (``visionzip convert``), or qwen-mini.
        folder: new.
        width: of the language model, a multiple of 64.
        layers: of it.
    """
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    text = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 8 * width // 3 // 64 * 64}
    text |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    config.text_config.update(text)
    (_write_qwen if config.model_type == "qwen3_vl" else _write_llava)(source, folder, config, width)
    config.dtype = torch.float32
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def _write_llava(source: str, folder: str, config: Any, width: int) -> None:
    config.vision_config.update({"image_size": 336, "patch_size": 14, "hidden_size": 256, "intermediate_size": 1024})
    config.image_seq_length = 576
    processor = AutoProcessor.from_pretrained(source)
    processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.save_pretrained(folder)


def _write_qwen(source: str, folder: str, config: Any, width: int) -> None:
    config.text_config.rope_parameters["mrope_section"] = [12, 10, 10]
    vision = {"patch_size": 14, "hidden_size": 256, "intermediate_size": 1024, "out_hidden_size": width}
    config.vision_config.update({**vision, "num_position_embeddings": 48**2})
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("config.json", "training.json", "*.safetensors", "*.md", "*.png")
    )
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):  # whose class needs torchvision
        file = Path(folder, name)
        size = {"patch_size": 14, "size": {"shortest_edge": 56**2, "longest_edge": 672**2}}
        file.write_text(json.dumps(json.loads(file.read_text()) | size, indent=2), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="llava-mini in transformers' layout, or qwen-mini")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--width", type=int, default=768, help="of the language model (default: 768)")
    parser.add_argument("--layers", type=int, default=8, help="of the language model (default: 8)")
    arguments = parser.parse_args()
    write_random(str(arguments.source), str(arguments.folder), arguments.width, arguments.layers)

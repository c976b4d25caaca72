"""A LLaVA-1.5 of random weights with the embedded model's tokenizer, to measure servers with; usage in ``--help``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


def write_random(source: str, folder: str, width: int, layers: int) -> None:
    """Write a model of some size, with the vision tower's grid of LLaVA-1.5 (576 patches).

    Args:
        source: llava-mini in transformers' layout (``visionzip convert``).
        folder: new.
        width: of the language model, a multiple of 64.
        layers: of it.
    """
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    text = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 8 * width // 3 // 64 * 64}
    text |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    config.text_config.update(text)
    config.vision_config.update({"image_size": 336, "patch_size": 14, "hidden_size": 256, "intermediate_size": 1024})
    config.image_seq_length = 576
    config.dtype = torch.float32
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(source)
    processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="llava-mini in transformers' layout")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--width", type=int, default=768, help="of the language model (default: 768)")
    parser.add_argument("--layers", type=int, default=8, help="of the language model (default: 8)")
    arguments = parser.parse_args()
    write_random(str(arguments.source), str(arguments.folder), arguments.width, arguments.layers)

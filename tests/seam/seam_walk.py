"""Every class of transformers that takes ``mm_encoder_outputs``: a tiny random model of each, and a prompt with images.

Nothing is written for one class: its own default config is made small, and of several ways to give images the first is
taken that its ``get_image_features`` accepts.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from seam_models import BOS, END, EOS, IMAGE, PAD, START, VIDEO

SIDE, PATCH = 32, 4
_SMALL = [  # the first pattern that fits a number's name says what it becomes
    (r"vocab_size", 120),
    (r"^image_token_(id|index)$", IMAGE),
    (r"^video_token_(id|index)$", VIDEO),
    (r"start_token_id$", START),
    (r"end_token_id$", END),
    (r"^bos_token_id$", BOS),
    (r"^eos_token_id$", EOS),
    (r"^pad_token_id$", PAD),
    (r"heads$", 4),
    (r"head_dim$", 8),
    (r"experts_per_tok$|top_k_experts$|num_experts_per_token$", 2),
    (r"^(num|n)_(routed_|local_)?experts$", 4),
    (r"intermediate_size|ffn_dim|mlp_dim", 48),
    (r"(hidden_size|embed_dim|d_model|hidden_dim|embedding_dim)$|^(width|dim)$|_dim$", 32),
    (r"num_hidden_layers$|num_layers$|^depth$|^n_layers$", 2),
    (r"^image_size$", SIDE),
    (r"patch_size$", PATCH),
    (r"max_position_embeddings$", 4096),
]
_CHANGES: dict[str, dict[str, Any]] = {  # what no rule gives a class's config
    "Aria": {"projector_patch_to_query_dict": {64: 16}},
    "Chameleon": {"vocabulary_map": {"<image>": IMAGE}},
    "DeepseekOcr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "Ernie4_5_VL": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "HunYuanVL": {"text_config.head_dim": 8},
    "Lfm3Vl": {"text_config.layer_types": ["conv", "full_attention"]},
    "Step3p7": {"text_config.sliding_window": 64},
    "VipLlava": {"vision_feature_layers": [-2, -1]},
    "Molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "Dots3Note": {"vision_config.adapter_input_size": 32, "audio_config.adapter_input_size": 32},
    "MistralLarge4": {"text_config.kv_source_layers": [0, 0]},
}
_MISSING = {"pad_token_id": PAD, "image_token_id": IMAGE, "video_token_id": VIDEO}
_DERIVED = ("id2label", "label2id", "per_layer_config", "dtype", "transformers_version", "architectures")


def classes() -> Iterator[type]:
    """They, found in transformers' own files, in alphabetical order of these."""
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "mm_encoder_outputs" not in file.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for own in vars(module).values():
            here = isinstance(own, type) and own.__module__ == module.__name__ and hasattr(own, "generate")
            if here and "mm_encoder_outputs" in inspect.signature(own.forward).parameters:
                yield own


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values made small; lists with an entry for each layer keep the first and the last."""
    layers = next((values[name] for name in ("num_hidden_layers", "depth", "num_layers") if name in values), None)
    return {name: _small(name, value, layers) for name, value in values.items() if name not in _DERIVED}


def _small(name: str, value: Any, layers: int | None) -> Any:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return _rope(value) if name.startswith("rope") else shrunk(value)
    if isinstance(value, list) and len(value) == layers:
        return [value[0], value[-1]]
    if isinstance(value, int) and not isinstance(value, bool):
        return next((number for pattern, number in _SMALL if re.search(pattern, name)), value)
    return _MISSING.get(name) if value is None else value


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions of heads of 8: three axes share the four angles; some have settings by kind of layer."""
    if any(isinstance(value, dict) for value in values.values()):
        return {kind: _rope(value) if isinstance(value, dict) else value for kind, value in values.items()}
    whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in values else {}
    return values | whole | ({"mrope_section": [2, 1, 1]} if "rope_type" in values else {})


def tiny_config(own: type) -> Any:
    """The default config of a class, made small."""
    values = own.config_class().to_dict()
    for name, kind in own.config_class.sub_configs.items():
        if values.get(name) is None and name.startswith("vision") and hasattr(kind, "model_type"):
            values[name] = kind().to_dict()
    values = shrunk(values)
    for path, value in next(
        (own_changes for start, own_changes in _CHANGES.items() if own.__name__.startswith(start)), {}
    ).items():
        *parents, name = path.split(".")
        holder = values
        for parent in parents:
            holder = holder[parent]
        holder[name] = value
    return own.config_class.from_dict(values)


def build(own: type) -> Any:
    """A tiny model of a class, with random weights.

    Raises:
        Exception: whatever the class says to a config that was made small by rule.
    """
    torch.manual_seed(0)
    config = tiny_config(own)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in own(config).parameters())
    if size > 20e6:
        raise ValueError(f"{size / 1e6:.0f} M parameters are left when the config is made small by rule")
    model = own(config).eval()
    for parameter in model.parameters():  # some are left as they were in memory
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    model.generation_config.suppress_tokens = [START, END, IMAGE, VIDEO]
    return model


def _vision(config: Any, name: str, default: int) -> int:
    for own in (getattr(config, "vision_config", None), config):
        value = own.get(name) if isinstance(own, dict) else getattr(own, name, None)
        if value is not None:
            return value if isinstance(value, int) else value[0]
    return default


def images(model: Any) -> Iterator[dict[str, Any]]:
    """Ways to give a class two images, the first one larger where sizes are free."""
    noise = torch.Generator().manual_seed(0)
    config, taken = model.config, inspect.signature(type(model.model).get_image_features).parameters
    patch, side = _vision(config, "patch_size", PATCH), _vision(config, "image_size", SIDE)
    frames, channels = _vision(config, "temporal_patch_size", 1), _vision(config, "in_channels", 3)
    grid = torch.tensor([[1, 4, 8], [1, 4, 4]])
    if "image_grid_thw" in taken:
        merge = {"image_merge_sizes": torch.tensor([2, 2])} if "image_merge_sizes" in taken else {}
        flat = channels * patch**2
        for shape in ([flat * frames], [flat * 2], [flat], [channels, patch, patch], [channels, frames, patch, patch]):
            yield {"pixel_values": torch.randn(48, *shape, generator=noise), "image_grid_thw": grid, **merge}
    sizes = {"image_sizes": torch.tensor([[side, side]] * 2)} if "image_sizes" in taken else {}
    if "target_sizes" in taken:
        strip = torch.randn(1, 3, patch, 48 * patch, generator=noise)
        yield {"pixel_values": strip, "target_sizes": grid[:, 1:]}
    if "spatial_shapes" in taken:
        pixels = torch.randn(2, 16, 3 * patch**2, generator=noise)
        shapes = {"spatial_shapes": torch.tensor([[4, 4]] * 2), "pixel_attention_mask": torch.ones(2, 16).long()}
        yield {"pixel_values": pixels, **shapes}
    if "image_position_ids" in taken:  # 6 x 6 patches, and 3 x 6 with as many that are none
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(-1).expand(2, -1, -1).clone()
        places[1, 18:] = -1
        for wide in (patch, 3 * patch):
            pixels = torch.rand(2, 36, channels * wide**2, generator=noise)
            yield {"pixel_values": pixels, "image_position_ids": places}
    if "high_res_pixel_values" in taken:
        sizes["high_res_pixel_values"] = torch.randn(2, 3, side, side, generator=noise)
    yield {"pixel_values": torch.randn(2, 3, side, side, generator=noise), **sizes}
    if "pixel_attention_mask" in taken:
        sizes["pixel_attention_mask"] = torch.ones(2, 1, side, side).long()
    yield {"pixel_values": torch.randn(2, 1, 3, side, side, generator=noise), **sizes}


def encode(model: Any) -> tuple[dict[str, Any], list[int]]:
    """Two images that a class takes, and how many tokens each has.

    Raises:
        ValueError: it takes them in none of the ways.
    """
    if not hasattr(getattr(model, "model", None), "get_image_features"):
        raise ValueError("its base model has no get_image_features")
    said: list[str] = []
    for given in images(model):
        try:
            tokens = model.model.get_image_features(**given, return_dict=True).pooler_output
            lengths = [len(tokens) // 2] * 2 if tokens[0].ndim == 1 else [len(own) for own in tokens]
            if len(lengths) == 2:
                return given, lengths
            said.append(f"its {len(lengths)} outputs are not by image")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"takes images in none of {len(said)} ways; first: {said[0]}")


def prompts(lengths: list[int], given: dict[str, Any], cut: int | None = None) -> dict[str, Any]:
    """Two rows with an image each, the shorter one padded on the left.

    Args:
        lengths: placeholders of each.
        given: the images.
        cut: as processors do that end each row of an image's placeholders, so many, with a token of its own.
    """

    def image(length: int) -> list[int]:
        return [token for at in range(length) for token in ([IMAGE, 50] if cut and (at + 1) % cut == 0 else [IMAGE])]

    rows = [[BOS, 20, START, *image(lengths[0]), END, 30, 31], [BOS, START, *image(lengths[1]), END, 40]]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **given}

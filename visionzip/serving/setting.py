"""What a server needs to know about a setting, from configs and shapes alone. Nothing here imports vLLM."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from visionzip.config import VisionZipConfig
from visionzip.methods import check_setting, has_size_bias, method_of, positions_of, token_counts

TESTED = {"vllm": ("0.32",), "transformers": ("5.19",)}  # the tested versions; others warn
_BIAS = "size_bias=true (vLLM's paged attention takes no bias by token)"
_FLAT = '"positions": "consecutive", "size_bias": false'
logger = logging.getLogger(__name__)


def served_setting(hf_config: Any) -> VisionZipConfig | None:
    """Read ``config.visionzip`` of a model that vLLM has loaded, and check that it can be served.

    What the setting does not say is as in ``visionzip(model)``: the layer is the one on which a LLaVA's projector was
    trained, or Qwen-VL's last; a Qwen-VL keeps half of its tokens.

    Args:
        hf_config: the model's config of transformers, after vLLM's ``--hf-overrides``.

    Returns:
        The setting; None if there is none, so that the model is served uncompressed.

    Raises:
        TypeError: a number or a switch in it has the wrong type.
        ValueError: it does not fit the model, or vLLM cannot serve it; the message says what to set instead.
    """
    values = getattr(hf_config, "visionzip", None)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f'config.visionzip={values!r} is no setting: give a dict, such as {{"keep": 64}}')
    if values.get("keep") is not None and (counts := values.keys() & {"dominant", "contextual"}):
        raise ValueError(
            f"config.visionzip has keep={values['keep']} beside {', '.join(sorted(counts))}: give one or the other"
        )
    return (_llava_setting if hasattr(hf_config, "vision_feature_layer") else _qwen_setting)(values, hf_config)


def _llava_setting(values: dict[str, Any], hf_config: Any) -> VisionZipConfig:
    layers, vision = hf_config.vision_feature_layer, hf_config.vision_config
    if not isinstance(layers, int):
        raise ValueError(
            f"the projector of this model takes the hidden states {list(layers)} (vision_feature_layer): VisionZip "
            "compresses the output of one encoder layer"
        )
    config = VisionZipConfig.from_dict({"layer": _encoder_layer(layers)} | values)
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"VisionZip reads CLIP and SigLIP encoders, not this model's {vision.model_type}")
    check_setting(config, hf_config, _side(vision), hasattr(hf_config, "image_grid_pinpoints"))
    _check_layer(config, layers, vision)
    _check_language_model(config)
    return config


def _qwen_setting(values: dict[str, Any], hf_config: Any) -> VisionZipConfig:
    depth = hf_config.vision_config.depth
    layers = [layer - depth for layer in getattr(hf_config.vision_config, "fullatt_block_indexes", range(depth))]
    share = {} if values.keys() & {"keep", "dominant", "contextual"} else {"keep": 0.5}
    config = VisionZipConfig.from_dict({"layer": layers[-1], **share, **values})
    if config.video_keep is not None:
        raise ValueError(
            f"video_keep={config.video_keep} cannot be served: the plugin takes images only, so leave it out"
        )
    if config.layer not in layers:
        raise ValueError(
            f"layer={config.layer} of this model's encoder does not compare all patches of an image with each other: "
            f"use one of {', '.join(map(str, layers))}, or leave it out"
        )
    if config.positions == "consecutive":
        raise ValueError(
            'positions="consecutive" does not fit this model, whose tokens have a row and a column: leave it out'
        )
    if has_size_bias(config):
        raise ValueError(f'method={config.method!r} cannot be served with {_BIAS}: add "size_bias": false')
    check_setting(config, hf_config, 64, lays_out_patches=True)
    return config


def _check_layer(config: VisionZipConfig, feature_layer: int, vision: Any) -> None:
    """Check that the scored layer is the last one that vLLM builds of the encoder."""
    count, own = vision.num_hidden_layers, _encoder_layer(feature_layer)
    if config.layer not in (own, own + count if own < 0 else own - count):
        raise ValueError(
            f"layer={config.layer} of the setting is not the layer up to which vLLM builds the vision tower "
            f"(vision_feature_layer={feature_layer}): leave it out, or set both to the layer on which the projector "
            "was trained (--hf-overrides takes vision_feature_layer too)"
        )


def _encoder_layer(feature_layer: int) -> int:
    """Convert an index into the hidden states, the first of which are the embeddings, to an encoder layer."""
    return feature_layer if feature_layer < 0 else feature_layer - 1


def _check_language_model(config: VisionZipConfig) -> None:
    """Refuse original positions and a size bias, which vLLM's engine and its paged attention cannot have."""
    refused = []
    if positions_of(config) == "original":
        refused.append('positions="original" (vLLM numbers the tokens of these models one after the other)')
    if has_size_bias(config):
        refused.append(_BIAS)
    if refused:
        raise ValueError(
            f"method={config.method!r} cannot be served with {' and '.join(refused)}: add {_FLAT} to the setting"
        )


def _side(vision: Any) -> int:
    return vision.image_size // vision.patch_size


def tile_tokens(config: VisionZipConfig, vision: Any) -> int:
    """Count the visual tokens of an image, or of each tile of one, from shapes alone."""
    return token_counts(config, _side(vision) ** 2, vision.model_type == "clip_vision_model").total


def cache_key(config: VisionZipConfig) -> str:
    """Make the addition to an image's hash, as a cache outside this server may hold its tokens of other settings."""
    values = {**config.to_dict(), "positions": positions_of(config), "size_bias": has_size_bias(config)}
    return f"visionzip-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]}"


def tiles_at_once(encoder_budget: int, tile_length: int) -> int:
    """Count the images or tiles that may go through the encoder at once, at least 1.

    The engine's budget counts the tokens that an image keeps, but the encoder has all of its tokens in memory.

    Args:
        encoder_budget: how many tokens the engine lets the encoder make in a step.
        tile_length: how many tokens a tile has inside the encoder, with CLS.
    """
    return max(1, encoder_budget // tile_length)


def images_at_once(encoder_budget: int, lengths: list[int]) -> list[int]:
    """Split images of different sizes into runs of the encoder, for the reason that :func:`tiles_at_once` has.

    Args:
        encoder_budget: how many tokens the engine lets the encoder make in a step.
        lengths: how many tokens each image has before some are dropped.

    Returns:
        How many images each run has, at least 1.
    """
    counts: list[int] = []
    left = 0
    for length in lengths:
        if counts and length <= left:
            counts[-1] += 1
        else:
            counts, left = [*counts, 1], encoder_budget
        left -= length
    return counts


def check_parallel(config: VisionZipConfig, tensor_parallel: int, tower_mode: str) -> None:
    """Check that each rank has all heads of the vision tower, so that all ranks choose the same tokens.

    Raises:
        ValueError: the tower's heads are split over ranks, and the method reads attention.
    """
    if tensor_parallel > 1 and tower_mode != "data" and method_of(config).reads & {"scores", "keys"}:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel} splits the vision tower's heads, of which "
            f"method={config.method!r} needs all: start with --mm-encoder-tp-mode data"
        )


def check_engine(vllm_config: Any) -> None:
    """Check that the engine runs a Qwen-VL so that kept tokens keep their rows and columns.

    Args:
        vllm_config: vLLM's ``VllmConfig``.

    Raises:
        ValueError: it is started with an option that passes over where these are added; the message names it.
    """
    parallel, multimodal = vllm_config.parallel_config, vllm_config.model_config.multimodal_config
    options = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--enable-dbo or --ubatch-size": parallel.use_ubatching,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--video-pruning-rate": bool(multimodal.video_pruning_rate),
        "--enable-mm-embeds": multimodal.enable_mm_embeds,
        "compile_mm_encoder": vllm_config.compilation_config.compile_mm_encoder,
    }
    if given := [name for name, is_given in options.items() if is_given]:
        raise ValueError(f"a zipped Qwen-VL cannot be served with {' and '.join(given)}: start without")


def warn_untested(**versions: str) -> None:
    """Warn in the log of untested versions, and name the tested ones."""
    if any(not version.startswith(tuple(f"{each}." for each in TESTED[name])) for name, version in versions.items()):
        here = " and ".join(f"{name} {version}" for name, version in versions.items())
        tested = " and ".join(f"{name} {'.x or '.join(each)}.x" for name, each in TESTED.items())
        logger.warning("VisionZip was tested with %s, this is %s: check that answers are as you expect", tested, here)

"""The two layouts of a LLaVA checkpoint: LLaVA's own, and that of transformers' ``LlavaForConditionalGeneration``.

Names of weights and fields of the config, each way. What one of them cannot say is refused, with the reason. Of
transformers' other families, which have no counterpart, what LLaVA's config says about images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig, PretrainedConfig

from llava.mm_utils import parse_pinpoints
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.vision_tower import VisionTower

NATIVE = {"LlavaForConditionalGeneration": LlavaConfig, "LlavaNextForConditionalGeneration": LlavaNextConfig}
# What LLaVA's config says and transformers' has no field for; kept there, so that it can be converted back.
STORED = "original_llava"

BACKBONES = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM, "qwen2": LlavaQwenForCausalLM}
TOWERS = ("clip_vision_model", "siglip_vision_model")
# Its other fields are in the backbone's config, or these.
_RECOVERED = {"model_type", "visionzip", "mm_vision_config", "mm_image_newline", "_name_or_path"}
_TOWER_NAMES = {
    ("clip_vision_model", 1024, 336): "openai/clip-vit-large-patch14-336",
    ("siglip_vision_model", 1152, 384): "google/siglip-so400m-patch14-384",
}
# Weights: LLaVA's prefix, that of llava-hf's checkpoints, which transformers and vLLM read alike, and all that
# transformers' versions have written. The first that fits.
_PREFIXES = (
    (
        "model.vision_tower.vision_tower.vision_model.",
        "vision_tower.vision_model.",
        r"(model\.)?vision_tower\.(vision_model\.)?",
    ),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1.", r"(model\.)?multi_modal_projector\.linear_1\."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2.", r"(model\.)?multi_modal_projector\.linear_2\."),
    ("model.image_newline", "image_newline", r"(model\.)?image_newline$"),
    ("lm_head.", "language_model.lm_head.", r"(language_model\.)?lm_head\."),
    ("model.", "language_model.model.", r"(language_model\.model|model\.language_model)\."),
)


@dataclass(frozen=True)
class Kind:
    """How one of transformers' families takes images and videos.

    Attributes:
        model: its class.
        aspect_ratio: LLaVA's ``image_aspect_ratio``, which transformers' configs do not have; None leaves images to
            the processor below.
        tiles: an image is several tiles, whose number follows from its size.
        processor: of images, where it is not that of the vision tower.
        tower: its encoder of images.
    """

    model: str
    aspect_ratio: str | None
    tiles: bool = False
    processor: str | None = None
    tower: str = "vision_tower"


KINDS = {
    "llava": Kind("LlavaForConditionalGeneration", "pad"),
    "llava_next": Kind("LlavaNextForConditionalGeneration", "anyres", tiles=True),
    "llava_next_video": Kind("LlavaNextVideoForConditionalGeneration", "anyres", tiles=True),
    "llava_onevision": Kind("LlavaOnevisionForConditionalGeneration", None, True, "LlavaOnevisionImageProcessorPil"),
    "video_llava": Kind("VideoLlavaForConditionalGeneration", "pad", tower="image_tower"),
}


def native_key(key: str) -> str:
    """The name that llava-hf's checkpoints have for a weight of LLaVA's."""
    own, native, _ = next(entry for entry in _PREFIXES if key.startswith(entry[0]))
    return native + key.removeprefix(own)


def original_key(key: str) -> str:
    """LLaVA's name for a weight of a transformers checkpoint, old or new; as it is if it is none."""
    for own, _, pattern in _PREFIXES:
        if match := re.match(pattern, key):
            return own + key[match.end() :]
    return key


def native_config(config: Any, tower: VisionTower, path: str) -> PretrainedConfig:
    """The config in transformers of an original checkpoint, but for its vocabulary.

    Args:
        config: LLaVA's.
        tower: the model's, with or without weights.
        path: for messages.

    Raises:
        ValueError: transformers has no such model.
    """
    is_next = getattr(config, "mm_patch_merge_type", "flat") != "flat"
    keeps_cls = tower.cls_token and tower.select_feature == "cls_patch"
    _check_original(config, is_next and keeps_cls, path)
    backbone = type(config).__mro__[1]  # LlamaConfig of LlavaConfig, …
    fields = backbone().to_dict().keys()
    values = config.to_diff_dict()
    kept = {key: value for key, value in values.items() if key not in fields and key not in _RECOVERED}
    special: dict[str, Any] = {"image_seq_length": tower.num_patches}
    if is_next:
        # (height, width) there
        special["image_grid_pinpoints"] = [[h, w] for w, h in parse_pinpoints(config.image_grid_pinpoints)]
    if setting := getattr(config, "visionzip", None):
        special["visionzip"] = setting
    native = (LlavaNextConfig if is_next else LlavaConfig)(
        text_config=backbone(
            **{key: value for key, value in values.items() if key in fields and key not in ("architectures", "dtype")}
        ),
        vision_config=tower.config,
        projector_hidden_act="gelu",
        vision_feature_layer=tower.select_layer,
        # "default" takes the first token away, which is the CLS token only where there is one.
        vision_feature_select_strategy="default" if tower.cls_token and not keeps_cls else "full",
        tie_word_embeddings=config.tie_word_embeddings,
        **special,
        **{STORED: {"config": kept, "vocab_size": config.vocab_size}},
    )
    native.architectures = [next(name for name, kind in NATIVE.items() if kind is type(native))]
    return native


def _check_original(config: Any, tiles_keep_cls: bool, path: str) -> None:
    """Refuse what transformers' LLaVAs cannot be."""
    merge_type = getattr(config, "mm_patch_merge_type", "flat")
    aspect_ratio = str(getattr(config, "image_aspect_ratio", None))
    kind = getattr(config, "mm_projector_type", "linear")
    _refuse(
        path,
        "transformers",
        (
            kind != "mlp2x_gelu",
            f"its projector is {kind!r} (mm_projector_type), and transformers has 'mlp2x_gelu' only",
        ),
        (
            getattr(config, "mm_use_im_start_end", False),
            "it puts start and end tokens around images (mm_use_im_start_end), which transformers does not",
        ),
        (
            merge_type not in ("flat", "spatial_unpad"),
            f"it joins tiles by mm_patch_merge_type={merge_type!r}, transformers' LLaVA-NeXT by 'spatial_unpad' only",
        ),
        (
            (merge_type != "flat") != (aspect_ratio == "anyres"),
            f"mm_patch_merge_type={merge_type!r} with image_aspect_ratio={aspect_ratio!r}: transformers cuts images "
            "into tiles in LLaVA-NeXT ('spatial_unpad' with 'anyres') and never in LLaVA-1.5 ('flat' with 'pad')",
        ),
        (tiles_keep_cls, "its tiles keep the CLS token (mm_vision_select_feature='cls_patch')"),
        (getattr(config, "quantization_config", None) is not None, "its weights are quantised"),
    )


def original_config(native: Any, path: str) -> Any:
    """LLaVA's config of a transformers checkpoint, but for its vocabulary.

    Args:
        native: the checkpoint's config.
        path: for messages.

    Raises:
        ValueError: LLaVA has no such model.
    """
    text, vision = native.text_config, native.vision_config
    is_next = isinstance(native, LlavaNextConfig)
    cls_token = vision.model_type == "clip_vision_model"
    strategy = native.vision_feature_select_strategy
    _refuse(
        path,
        "LLaVA's layout",
        (
            text.model_type not in BACKBONES,
            f"its language model is {text.model_type!r}, supported are {list(BACKBONES)}",
        ),
        (
            vision.model_type not in TOWERS,
            f"its vision tower is {vision.model_type!r}, supported are CLIP and SigLIP",
        ),
        (
            native.projector_hidden_act != "gelu" or not native.multimodal_projector_bias,
            f"its projector has activation {native.projector_hidden_act!r} and "
            f"bias={native.multimodal_projector_bias}, LLaVA's has 'gelu' and a bias",
        ),
        (
            not isinstance(native.vision_feature_layer, int),
            f"it reads several layers of its vision tower (vision_feature_layer={native.vision_feature_layer})",
        ),
        (
            strategy == "default" and not cls_token,
            "vision_feature_select_strategy='default' leaves out the first patch of an encoder without a CLS token",
        ),
        (is_next and cls_token and strategy == "full", "its tiles keep the CLS token"),
        (getattr(native, "quantization_config", None) is not None, "its weights are quantised"),
    )
    model_class = BACKBONES[text.model_type]
    tower = _TOWER_NAMES.get((vision.model_type, vision.hidden_size, vision.image_size), "vision_tower")
    values = {
        "mm_vision_tower": tower,
        # LLaVA's own defaults are others: what it does not say in its config must not be said here.
        **(_stored(native) or {"mm_use_im_start_end": False, "mm_use_im_patch_token": False}),
        **_plain(text),
        **image_fields(native),
        "tie_word_embeddings": native.tie_word_embeddings,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.hidden_size,
        "mm_patch_merge_type": "spatial_unpad" if is_next else "flat",
        "architectures": [model_class.__name__],
    }
    return model_class.config_class(**values)


def image_fields(native: Any) -> dict[str, Any]:
    """What LLaVA's config says about images: the encoder, what is read of it, and how they are cut.

    Args:
        native: the config of one of :data:`KINDS`.
    """
    vision, kind, stored = native.vision_config, KINDS[native.model_type], _stored(native)
    keeps_cls = vision.model_type == "clip_vision_model" and native.vision_feature_select_strategy == "full"
    fields = {
        "mm_vision_config": vision.to_diff_dict(),
        "mm_vision_select_layer": native.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if keeps_cls else "patch",
        "image_aspect_ratio": stored.get("image_aspect_ratio") if stored else kind.aspect_ratio,
        "visionzip": getattr(native, "visionzip", None),
    }
    if kind.tiles:  # (height, width) there
        fields["image_grid_pinpoints"] = [[width, height] for height, width in native.image_grid_pinpoints]
    return {name: value for name, value in fields.items() if value is not None}


def _stored(native: Any) -> dict[str, Any]:
    """LLaVA's config from before a checkpoint was converted; nothing if it never was LLaVA's."""
    return getattr(native, STORED, {}).get("config", {})


def original_values(config: Any) -> dict[str, Any]:
    """``config.json`` of LLaVA's config, with the names of the transformers that LLaVA itself runs on (4.37) too."""
    values = config.to_diff_dict()
    if dtype := values.get("dtype"):
        values["torch_dtype"] = dtype
    if theta := (values.get("rope_parameters") or {}).get("rope_theta"):
        values["rope_theta"] = theta
    return values


def _plain(text: PretrainedConfig) -> dict[str, Any]:
    values = text.to_diff_dict()
    for name in ("model_type", "architectures", "dtype", "transformers_version", "_name_or_path"):
        values.pop(name, None)
    return values


def _refuse(path: str, target: str, *reasons: tuple[Any, str]) -> None:
    for applies, reason in reasons:
        if applies:
            raise ValueError(f"{path} has no counterpart in {target}: {reason}")

"""Tiny checkpoints of today's families on disk, as their hub pages have them: weights, processor and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from seam_models import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}PICTURE"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else "
    "message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>{% else %}"
    "{{ part.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"]
_QWEN_SPECIAL += ["<|image_pad|>", "<|video_pad|>"]


class Recipe(NamedTuple):
    """What a family's hub page has beside its weights.

    Attributes:
        special: tokens 0 to 6: begin, end, padding, start and end of an image, image, video (:mod:`seam_models`).
        template: its chat template.
        images: ``preprocessor_config.json``.
        processor: ``processor_config.json``, if there is one.
        tokens: further special tokens by name, as ``tokenizer_config.json`` has them.
    """

    special: list[str]
    template: str
    images: dict[str, Any]
    processor: dict[str, Any] | None = None
    tokens: dict[str, str] | None = None


_QWEN_IMAGES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
_QWEN_IMAGES |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.4]}  # vLLM does not normalise without
_SQUARE_IMAGES = {"size": {"height": 32, "width": 32}, "do_resize": True}

RECIPES = {
    "qwen2_5_vl": Recipe(
        _QWEN_SPECIAL,
        _CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
        {
            "min_pixels": 256,
            "max_pixels": 4096,
            **_QWEN_IMAGES,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    ),
    "qwen3_vl": Recipe(
        _QWEN_SPECIAL,
        _CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
        {
            "size": {"shortest_edge": 256, "longest_edge": 4096},
            **_QWEN_IMAGES,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
        },
    ),
    "internvl": Recipe(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        _CHATML.replace("PICTURE", "<IMG_CONTEXT>\n"),
        {
            **_SQUARE_IMAGES,
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 4,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
        },
        {"image_seq_length": 16, "processor_class": "InternVLProcessor"},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "gemma3": Recipe(
        ["<bos>", "<eos>", "<pad>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<video>"],
        _GEMMA,
        {**_SQUARE_IMAGES, "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"},
        {"image_seq_length": 16, "processor_class": "Gemma3Processor"},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
}
RECIPES["qwen2_vl"] = RECIPES["qwen2_5_vl"]._replace(
    images=RECIPES["qwen2_5_vl"].images | {"processor_class": "Qwen2VLProcessor"}
)


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Bytes, behind the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*recipe.special, *letters])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(recipe.special)
    bos, eos, pad = recipe.special[:3]
    special = {"bos_token": bos if "gemma" in recipe.images["processor_class"].lower() else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, pad_token=pad, extra_special_tokens=recipe.tokens or {}, **special
    )


def save_checkpoint(name: str, folder: Path, model: Any = None) -> Path:
    """Write a tiny checkpoint of one of :data:`RECIPES`, or a model; its vocabulary has a token for each byte."""
    recipe, family = RECIPES[name], FAMILIES[name]
    (model or family.build(vocab_size=263)).save_pretrained(folder)
    _tokenizer(recipe).save_pretrained(folder)
    files = {"preprocessor_config": recipe.images, "chat_template": {"chat_template": recipe.template}}
    files |= {"processor_config": recipe.processor} if recipe.processor else {}
    if family.grids:
        video = {**recipe.images, "video_processor_type": f"Qwen{'3' if name == 'qwen3_vl' else '2'}VLVideoProcessor"}
        files["video_preprocessor_config"] = video
    for file, values in files.items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    return folder

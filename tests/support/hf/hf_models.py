"""Tiny random models of transformers' own LLaVA classes, with stock processors, for the tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from checkpoints import CLIP, SIGLIP, picture, scale_up

EDGE = CLIP["image_size"]  # 56 pixels: 4 x 4 patches
PATCHES = (EDGE // CLIP["patch_size"]) ** 2
BOS, EOS, PAD, IMAGE, VIDEO = range(5)
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Bytes, with the special tokens that the processors need."""
    special = ["<s>", "</s>", "<pad>", "<image>", "<video>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        padding_side=padding_side,
    )


def text_config(**changes: Any) -> LlamaConfig:
    """The language model's config."""
    values = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return LlamaConfig(**{**values, **changes}, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


def vision_config(siglip: bool = False, **changes: Any) -> Any:
    """The encoder's config: four layers of CLIP or SigLIP."""
    values = {key: value for key, value in (SIGLIP if siglip else CLIP).items() if key != "model_type"}
    return (SiglipVisionConfig if siglip else CLIPVisionConfig)(**{**values, **changes})


def build(model_class: type, config: Any, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model of random weights that are far from zero, in evaluation mode."""
    torch.manual_seed(seed)
    config._attn_implementation = attention
    model = model_class(config).eval()
    scale_up(model)
    model.generation_config.pad_token_id = PAD
    return model


def llava(siglip: bool = False, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """``LlavaForConditionalGeneration``; ``changes`` replace fields of its config."""
    config = _llava_config(LlavaConfig, siglip, {"image_seq_length": PATCHES, **changes})
    return build(LlavaForConditionalGeneration, config, attention, seed)


def llava_next(siglip: bool = False, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """``LlavaNextForConditionalGeneration``; ``changes`` replace fields of its config."""
    config = _llava_config(LlavaNextConfig, siglip, {"image_grid_pinpoints": PINPOINTS, **changes})
    return build(LlavaNextForConditionalGeneration, config, attention, seed)


def _llava_config(config_class: type, siglip: bool, own: dict[str, Any]) -> Any:
    values = {"vision_feature_select_strategy": "full" if siglip else "default", **own}
    tokens = {"image_token_index": IMAGE, "pad_token_id": PAD}
    return config_class(vision_config=vision_config(siglip), text_config=text_config(), **tokens, **values)


COUNTING = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
SQUARE = {"size": {"shortest_edge": EDGE}, "crop_size": {"height": EDGE, "width": EDGE}}


def llava_processor(padding_side: str = "left", **changes: Any) -> LlavaProcessor:
    """LLaVA-1.5's stock processor, as llava-hf's checkpoints set it up."""
    images, text = CLIPImageProcessorPil(**SQUARE), tokenizer(padding_side)
    return LlavaProcessor(images, text, chat_template=CHAT_TEMPLATE, **{**COUNTING, **changes})


def next_processor(padding_side: str = "left", **changes: Any) -> LlavaNextProcessor:
    """LLaVA-NeXT's."""
    images = LlavaNextImageProcessorPil(**SQUARE, image_grid_pinpoints=PINPOINTS)
    text = tokenizer(padding_side)
    return LlavaNextProcessor(images, text, chat_template=CHAT_TEMPLATE, **{**COUNTING, **changes})


FAMILIES = {"llava": (llava, llava_processor), "llava_next": (llava_next, next_processor)}
both = pytest.mark.parametrize("family", list(FAMILIES))


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Images of noise, all different."""
    return [picture(seed, size) for seed, size in enumerate(sizes)]


TEXTS = ["what is <image> here", "<image><image> two, side by side", "no picture", "a <image> b <image> c"]
IMAGES = pictures((90, 60), (60, 90), (56, 56), (120, 40), (80, 80))


def llava_batch(side: str = "left", texts: list[str] = TEXTS, **options: Any) -> Any:
    """What the stock processor makes of prompts: with one, two, no and two images, if not given."""
    count = sum(text.count("<image>") for text in texts)
    return llava_processor(side)(
        images=IMAGES[:count] or None, text=texts, padding=True, return_tensors="pt", **options
    )


def content(inputs: Any, row: int) -> torch.Tensor:
    """A prompt without its padding."""
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


def short_rows(inputs: Any, tokens: int) -> list[list[int]]:
    """Each prompt of LLaVA-1.5 without padding, with so many placeholders for each image as ``tokens`` says."""
    rows = []
    for row in range(len(inputs["input_ids"])):
        ids, short = content(inputs, row).tolist(), []
        while ids:
            is_image = ids[0] == IMAGE
            short += [IMAGE] * tokens if is_image else ids[:1]
            ids = ids[PATCHES if is_image else 1 :]
        rows.append(short)
    return rows


def one_image() -> Any:
    """What the stock processor makes of one prompt with one image."""
    return llava_processor()(images=pictures((90, 60)), text="what is <image> here", return_tensors="pt")


def answers(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    """The new tokens of a greedy answer."""
    out = model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False, **options})
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return out[:, inputs["input_ids"].shape[1] :]

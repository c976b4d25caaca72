"""Tiny random models of transformers' own LLaVA classes, with stock processors, for the tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
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
    """``LlavaForConditionalGeneration``."""
    values = {"vision_feature_select_strategy": "full" if siglip else "default", **changes}
    config = LlavaConfig(
        vision_config=vision_config(siglip),
        text_config=text_config(),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        pad_token_id=PAD,
        **values,
    )
    return build(LlavaForConditionalGeneration, config, attention, seed)


def llava_processor(padding_side: str = "left", **changes: Any) -> LlavaProcessor:
    """Its stock processor, as llava-hf's checkpoints set it up."""
    values = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    images = CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE})
    text = tokenizer(padding_side)
    return LlavaProcessor(images, text, chat_template=CHAT_TEMPLATE, **{**values, **changes})


def llava_next(siglip: bool = False, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """``LlavaNextForConditionalGeneration``."""
    values = {"vision_feature_select_strategy": "full" if siglip else "default", **changes}
    config = LlavaNextConfig(
        vision_config=vision_config(siglip),
        text_config=text_config(),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        pad_token_id=PAD,
        **values,
    )
    return build(LlavaNextForConditionalGeneration, config, attention, seed)


def next_processor(padding_side: str = "left", **changes: Any) -> LlavaNextProcessor:
    """Its stock processor, as llava-hf's checkpoints set it up."""
    values = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}, image_grid_pinpoints=PINPOINTS
    )
    text = tokenizer(padding_side)
    return LlavaNextProcessor(images, text, chat_template=CHAT_TEMPLATE, **{**values, **changes})


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Images of noise, all different."""
    return [picture(seed, size) for seed, size in enumerate(sizes)]


# --- plain references: one image, one prompt, one token at a time ---


@torch.no_grad()
def reference_tokens(
    tower: Any, pixels: torch.Tensor, dominant: int, contextual: int, layer: int = -2
) -> tuple[torch.Tensor, list[int]]:
    """Zipped tokens (K + M, D) of one image (3, h, w), before the projector, and the positions of the dominant ones.

    From the attention matrix of the eager kernel, with one loop per step of the method.
    """
    tower = copy.deepcopy(tower)
    tower.config._attn_implementation = "eager"
    output = tower(pixels[None], output_attentions=True, output_hidden_states=True)
    encoder_layer = tower.encoder.layers[layer]
    hidden = output.hidden_states[layer][0]  # of the layer: the embeddings come first
    attention = output.attentions[layer][0]  # (H, S, S)
    normed = encoder_layer.layer_norm1(output.hidden_states[layer - 1][0])
    keys = encoder_layer.self_attn.k_proj(normed).unflatten(-1, (attention.shape[0], -1)).mean(dim=1)
    if hasattr(tower.embeddings, "class_embedding"):
        ranked = attention[:, 0, 1:].sum(dim=0).argsort(descending=True).tolist()
        kept = sorted([0, *(patch + 1 for patch in ranked[: dominant - 1])])
    else:
        kept = sorted(attention.mean(dim=1).sum(dim=0).argsort(descending=True).tolist()[:dominant])
    rest = [position for position in range(len(hidden)) if position not in kept]
    targets = [rest[slot * (len(rest) // contextual)] for slot in range(contextual)]
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for position in rest:
        if position not in targets:
            similarity = [float(F.cosine_similarity(keys[position], keys[target], dim=0)) for target in targets]
            assigned[targets[similarity.index(max(similarity))]].append(position)
    merged = [hidden[target] + (hidden[others].mean(dim=0) if others else 0) for target, others in assigned.items()]
    return torch.stack([*(hidden[position] for position in kept), *merged]), kept


def reference_embeddings(model: Any, ids: torch.Tensor, runs: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Embeddings (L', D) of one prompt (L,) without padding, each run of placeholders replaced.

    Args:
        runs: for each image its number of placeholders and its features (n, D).
    """
    pieces, position, remaining = [], 0, list(runs)
    embed = model.get_input_embeddings()
    while position < len(ids):
        if ids[position] in (IMAGE, VIDEO):
            length, features = remaining.pop(0)
            pieces.append(features)
            position += length
        else:
            pieces.append(embed(ids[position : position + 1]))
            position += 1
    assert not remaining
    return torch.cat(pieces)


@torch.no_grad()
def reference_answer(model: Any, embeddings: torch.Tensor, steps: int) -> list[int]:
    """Greedy answer to embeddings (L', D): no batch, no cache, no generate."""
    answer: list[int] = []
    for _ in range(steps):
        hidden = model.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state[0, -1]
        answer.append(int(model.lm_head(hidden).argmax()))
        if answer[-1] == EOS:
            break
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(torch.tensor(answer[-1:]))])
    return answer


def content(inputs: Any, row: int) -> torch.Tensor:
    """A prompt without its padding."""
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]

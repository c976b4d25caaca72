"""The small model of today's families, ``checkpoints/qwen-mini``: its files, and the weights that it starts from.

A Qwen3-VL of transformers as it is (2 x 2 merger, rotary positions in three dimensions, deepstack), small enough to be
trained on a CPU. It starts from checkpoints/llava-mini: the blocks of its vision tower, the layers of its language
model and the embeddings of the words that both know. What llava-mini does not have (merger, deepstack, norms of
queries and keys) starts as plain as can be. :mod:`playground.qwen_training` does the rest.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration, set_seed
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from llava.model.tokenizer import load_tokenizer
from playground.recipe import run_step, write_record

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
STAGES = ("encoder", "model")
EDGE = 24  # pixels: of a token of the language model, 2 x 2 patches of 12
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGES = {
    "size": {"shortest_edge": 4 * EDGE**2, "longest_edge": 36 * EDGE**2},
    "patch_size": 12,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
}


def texts(data: Path) -> Iterator[str]:
    """What the model will read and say, without special tokens."""
    yield from ["user\n", "assistant\n"] * 1000
    for record in json.loads((data / "instruct.json").read_text()):
        for turn in record["conversations"]:
            yield turn["value"].removeprefix("<image>\n")


def write_processor(data: Path, folder: Path) -> Qwen2Tokenizer:
    """A tokenizer in which each word of the questions is one token, with the other files of a Qwen-VL processor."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trained.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator(texts(data), trainer)
    learnt = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL[1:]),
        model_max_length=2048,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    video = {**IMAGES, "video_processor_type": "Qwen3VLVideoProcessor"}
    for name, values in (("preprocessor_config", IMAGES), ("video_preprocessor_config", video)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer


def copy_processor(source: Path, folder: Path) -> None:
    """Copy a checkpoint's processor as it is: where torchvision is missing, loading and saving leaves out videos."""
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "preprocessor", "video_preprocessor", "chat_template")):
            shutil.copy(path, folder / path.name)


def config_for(tokenizer: Any) -> Qwen3VLConfig:
    """Width and depth of llava-mini: five blocks of its tower, which is what LLaVA reads, and four layers of text."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 5,
        "hidden_size": 128,
        "hidden_act": "gelu",
        "intermediate_size": 512,
        "num_heads": 4,
        "patch_size": 12,
        "out_hidden_size": 160,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [1, 2, 3],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )


def start_from(llava: Any, llava_tokenizer: Any, tokenizer: Any) -> Qwen3VLForConditionalGeneration:
    """A model with llava-mini's weights wherever the two have the same part."""
    set_seed(0)
    model = Qwen3VLForConditionalGeneration(config_for(tokenizer))
    with torch.no_grad():
        _start_encoder(model.model.visual, llava.get_vision_tower().vision_tower.vision_model)
        text, own = llava.get_model(), model.model.language_model
        own.load_state_dict(
            {name: value for name, value in text.state_dict().items() if name.startswith(("layers.", "norm."))},
            strict=False,
        )
        for layer, old in zip(own.layers, text.layers, strict=True):
            for name in ("q", "k"):  # normed to the size that llava-mini's have for inputs without a direction
                weight = getattr(old.self_attn, f"{name}_proj").weight * old.input_layernorm.weight
                getattr(layer.self_attn, f"{name}_norm").weight.fill_(weight.square().sum(dim=1).mean().sqrt())
        rows = [_row_of(token, llava_tokenizer) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        for new, old in ((own.embed_tokens, text.embed_tokens), (model.lm_head, llava.lm_head)):
            new.weight.normal_(0, old.weight.std().item())
            known = [(place, row) for place, row in enumerate(rows) if row is not None]
            new.weight[[place for place, _ in known]] = old.weight[[row for _, row in known]]
    return model


def _row_of(token: str, tokenizer: Any) -> int | None:
    """The row of llava-mini's embeddings that means the same."""
    alike = {"<|im_start|>": "<s>", "<|im_end|>": "</s>"}
    word = token.removeprefix("Ġ")
    for name in (alike.get(token, f"▁{word}"), word):
        row = tokenizer.get_vocab().get(name)
        if row is not None and token not in SPECIAL[3:]:
            return row
    return None


def _start_encoder(own: nn.Module, clip: nn.Module) -> None:
    """CLIP's embeddings of patches and places, and its blocks; no CLS token and no norm in front of the blocks."""
    embeddings = clip.embeddings
    frames = own.config.temporal_patch_size
    own.patch_embed.proj.weight.copy_(embeddings.patch_embedding.weight[:, :, None] / frames)
    own.patch_embed.proj.bias.zero_()
    own.pos_embed.weight.copy_(embeddings.position_embedding.weight[1:])
    for block, layer in zip(own.blocks, clip.encoder.layers, strict=False):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        block.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        block.attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        pairs = [(block.attn.proj, attention.out_proj), (block.norm1, layer.layer_norm1)]
        pairs += [(block.norm2, layer.layer_norm2)]
        pairs += [(block.mlp.linear_fc1, layer.mlp.fc1), (block.mlp.linear_fc2, layer.mlp.fc2)]
        for new, old in pairs:
            new.load_state_dict(old.state_dict())
    for merger in own.deepstack_merger_list:
        merger.linear_fc2.weight.zero_()


def start(data: Path, folder: Path, llava_mini: str = "checkpoints/llava-mini") -> None:
    """Write the processor, and the model that training starts from."""
    from llava.model.builder import load_pretrained_model  # noqa: PLC0415 - what follows does without

    tokenizer = write_processor(data, folder)
    _, llava, _, _ = load_pretrained_model(llava_mini, dtype=torch.float32, device="cpu")
    start_from(llava, load_tokenizer(llava_mini), tokenizer).save_pretrained(folder)


def export(run: Path, folder: Path) -> None:
    """Write a run's model in bfloat16 with its processor, and what is known of its training."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(run / "model", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    copy_processor(run / "model", folder)
    write_record(run, STAGES, folder)


if __name__ == "__main__":
    steps = (
        ("start", start, "folder of training scenes"),
        ("export", export, "folder of the finished run"),
    )
    sys.exit(run_step(__doc__, steps))

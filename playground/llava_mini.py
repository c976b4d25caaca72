"""Two steps of scripts/train_llava_mini.sh that only the embedded model needs; usage in ``--help``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from llava.model.builder import load_pretrained_model
from llava.model.tokenizer import load_tokenizer
from llava.train.labels import render
from playground.recipe import run_step, write_record

VOCABULARY = 768  # at most; every word of the scenes is one token then
STAGES = ("tower-small", "tower-kinds", "model-small", "tower", "projector", "model")
SPECIAL = ("<unk>", "<s>", "</s>")


def prompts(data: Path) -> Iterator[str]:
    """The stretches of text that are tokenized apart: sentences, and prompts cut at the ends of answers."""
    for record in json.loads((data / "tower.json").read_text()):
        yield from (f" {sentence}" for sentence in record["captions"])  # SentencePiece puts a space before a text
    for record in json.loads((data / "instruct.json").read_text()):
        first, *rest = render(record["conversations"], "v1")[0].split("</s>")
        yield f" {first}"
        yield from rest


def write_tokenizer(data: Path, folder: Path) -> None:
    """A byte-pair tokenizer like Llama's: words of the text are single tokens, anything else falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # So that no token spans two words, or a word and its question mark.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False, limit_alphabet=100
    )
    tokenizer.train_from_iterator(prompts(data), trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
    data["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "padding_side": "right",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    load_tokenizer(folder).save_pretrained(folder)


def write_language_model(data: Path, folder: Path) -> None:
    """The tokenizer, and a Llama for it with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(data, folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(load_tokenizer(folder)),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def export(run: Path, folder: Path) -> None:
    """Write a run's model in bfloat16 as a checkpoint that needs no other file, and what is known of its training."""
    tokenizer, model, _, _ = load_pretrained_model(str(run / "model"), dtype=torch.bfloat16, device="cpu")
    model.config.mm_vision_tower = "clip-vit-mini-patch12-144"  # a name; its config and weights are in the checkpoint
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_record(run, STAGES, folder)


if __name__ == "__main__":
    steps = (
        ("language", write_language_model, "folder of training scenes"),
        ("export", export, "folder of the finished run"),
    )
    sys.exit(run_step(__doc__, steps))

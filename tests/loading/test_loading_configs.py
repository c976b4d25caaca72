"""What is read from a checkpoint's config, of whatever age."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import (
    edit_config,
    write_checkpoint,
    write_qwen_tokenizer,
)
from layouts import assert_same, load, weights_of
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaQwenForCausalLM
from llava.model.builder import load_pretrained_model


@pytest.mark.parametrize(
    ("model_type", "model_class", "theta"),
    [
        ("llava_llama", LlavaLlamaForCausalLM, 10000.0),
        ("llava_mistral", LlavaMistralForCausalLM, 1000000.0),
        ("llava_qwen", LlavaQwenForCausalLM, 1000000.0),
    ],
)
def test_backbones(model_type: str, model_class: type, theta: float, tmp_path: Path):
    tied = model_type == "llava_qwen"
    folder = write_checkpoint(
        tmp_path / "llava", model_type=model_type, rope_theta=theta, tie_word_embeddings=tied, sliding_window=None
    )
    if tied:
        write_qwen_tokenizer(folder)
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert type(model) is model_class
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, theta ** -(torch.arange(0, 8, 2) / 8))
    expected = weights_of(folder)
    assert ("lm_head.weight" in expected) is not tied
    assert_same(model.state_dict(), {"lm_head.weight": expected["model.embed_tokens.weight"], **expected})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    text = "a cat<|im_end|>" if tied else "a cat"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "a cat"
    assert tokenizer(text).input_ids[0] == (tokenizer.convert_tokens_to_ids("a") if tied else tokenizer.bos_token_id)
    model.save_pretrained(tmp_path / "saved")
    assert_same(weights_of(tmp_path / "saved"), expected)


EARLY = {  # fields of liuhaotian/llava-v1.5-7b that are transformers' own now, or nobody's
    "model_type": "llava",
    "torch_dtype": "float16",
    "max_length": 4096,
    "mm_resampler_type": None,
    "rope_scaling": None,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "transformers_version": "4.31.0",
}


@pytest.mark.parametrize(
    ("removed", "changes", "name"),
    [
        ([], EARLY, None),
        (["architectures"], {"model_type": "llava"}, None),
        (["architectures"], {}, None),
        (["architectures", "model_type"], {}, "llava-v1.5-7b"),
        ([], {"architectures": ["LlamaForCausalLM"]}, None),  # what a projector was pretrained on
    ],
)
def test_configs(removed: list[str], changes: dict[str, Any], name: str | None, copied, log):
    folder = copied()
    edit_config(folder, *removed, **changes)
    model = load(folder, model_name=name)
    assert type(model) is LlavaLlamaForCausalLM and model.config.model_type == "llava_llama"
    assert model.dtype == torch.float32 and not log.messages


def test_hint_where_the_config_is_silent(copied):
    folder = copied(model_type="llava_mistral", sliding_window=None)
    edit_config(folder, "architectures", "model_type")
    assert type(load(folder, model_name="llava-v1.6-mistral-7b")) is LlavaMistralForCausalLM


def test_vicunas_generation_config(copied, tmp_path: Path):
    """It has sampling parameters without sampling; transformers refuses to save that once it is modified."""
    folder = copied()
    settings = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.9, "top_p": 0.6}))
    load(folder).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["top_p"] == 0.6

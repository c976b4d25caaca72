"""Templates that no recorded case has, and LLaVA's other names. The recorded ones are in test_golden.py."""

from __future__ import annotations

import base64
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch

from checkpoints import picture
from llava.conversation import conv_mode_for, conv_templates, default_conversation
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, load_image_from_base64

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def prompt(mode: str, *turns: str | None) -> str:
    conversation = conv_templates[mode].copy()
    for index, text in enumerate(turns):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


def test_qwen():
    assert prompt("qwen_1_5", "Hi", "Yes?", "Bye", None) == (
        f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama_2():
    """The system text is inside the first instruction; the tokenizer puts the first <s>."""
    first, _, rest = prompt("llava_llama_2", "Hi", "Yes?", "Bye", None).partition("Hi")
    assert first.startswith("[INST] <<SYS>>\nYou are a helpful language and vision assistant.")
    assert first.endswith("\n<</SYS>>\n\n")
    assert rest == " [/INST] Yes? </s><s>[INST] Bye [/INST]"


def test_a_turn_without_text_is_one_to_generate():
    assert prompt("vicuna_v1", "Hi", "") == prompt("vicuna_v1", "Hi", None)


def test_turns_can_be_filled_in():
    """As LLaVA's own loop does it."""
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message("ASSISTANT", None)
    conversation.messages[-1][-1] = "Yes?"
    assert conversation.get_prompt().endswith("ASSISTANT: Yes? ")


def test_copies_are_independent():
    default_conversation.copy().append_message("USER", "Hi")
    assert default_conversation.messages == []


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava_v1"),
        ("liuhaotian/llava-v1.6-vicuna-13b", "llava_v1"),
        ("liuhaotian/llava-v1.6-mistral-7b", "mistral_instruct"),
        ("liuhaotian/llava-v1.6-34b", "chatml_direct"),
        ("liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        ("lmms-lab/llava-next-qwen-32b", "qwen_1_5"),
        ("my/model", "vicuna_v1"),
    ],
)
def test_the_template_of_a_checkpoint(path: str, mode: str):
    assert conv_mode_for(get_model_name_from_path(path)) == mode


def test_model_names():
    assert get_model_name_from_path("/models/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert get_model_name_from_path("runs/llava-lora/checkpoint-100") == "llava-lora_checkpoint-100"


def test_an_image_as_text():
    data = BytesIO()
    picture(0).save(data, format="PNG")
    assert load_image_from_base64(base64.b64encode(data.getvalue()).decode()).tobytes() == picture(0).tobytes()


def test_stopping_at_keywords():
    tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: ["".join(map(chr, row)) for row in ids.tolist()])
    stop = KeywordsStoppingCriteria(["###"], tokenizer, torch.empty(2, 0))
    assert not stop(torch.tensor([[65, 35, 35, 35], [65, 66, 67, 68]]), None)
    assert stop(torch.tensor([[65, 35, 35, 35], [35, 35, 35, 66]]), None)

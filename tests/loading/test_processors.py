"""What ``visionzip convert`` writes beside the weights: transformers' processor does what LLaVA's functions do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from checkpoints import NEXT, SIGLIP, picture, write_tokenizer
from layouts import convert
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.processors import chat_template
from llava.model.tokenizer import load_tokenizer


@pytest.mark.parametrize("legacy", [False, True])
def test_texts_get_the_ids_that_llavas_functions_give(legacy: bool, copied, tmp_path: Path):
    """Of one tokenization, what LLaVA makes of the pieces between images; and back without ``<image>``."""
    source = copied()
    write_tokenizer(source, legacy=legacy)
    convert(source, tmp_path / "native", "transformers")
    convert(tmp_path / "native", tmp_path / "back", "original")
    native = AutoProcessor.from_pretrained(tmp_path / "native").tokenizer
    own, back = load_tokenizer(source), load_tokenizer(tmp_path / "back")
    for prompt in (
        "USER: <image>\nWhat is there? ASSISTANT:",
        "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
        "[INST] <image>\nWhat? [/INST] A cat. </s>[INST] Sure? [/INST]",
        "  two <image>\n<image>\nboth? ",
        "is <image> in it",
        "\nno image",
    ):
        expected = tokenizer_image_token(prompt, own, image_token_index=480)
        assert native(prompt).input_ids == expected, prompt
        assert tokenizer_image_token(prompt, back, image_token_index=480) == expected, prompt
    assert native.decode(native("A cat's.").input_ids, skip_special_tokens=True) == "A cat's."


OTHER_GRIDS = {**NEXT, "image_grid_pinpoints": "[(56, 112), (168, 56)]"}  # (width, height), the other way round there


@pytest.mark.parametrize("options", [{}, NEXT, OTHER_GRIDS, {"vision": SIGLIP}, {"vision": SIGLIP, **NEXT}])
@pytest.mark.parametrize("size", [(90, 60), (60, 91), (200, 50), (33, 47), (100, 100)], ids=str)
def test_images_get_the_pixels_that_llavas_functions_give(options, size, make_checkpoint, tmp_path: Path):
    source = make_checkpoint(**options)
    convert(source, tmp_path / "native", "transformers")
    native = AutoProcessor.from_pretrained(tmp_path / "native")
    _, model, image_processor, _ = load_pretrained_model(str(source), device="cpu")
    image = picture(0, size)
    inputs = native(images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    pixels = process_images([image], image_processor, model.config)
    assert torch.equal(inputs["pixel_values"], pixels)
    placeholders = int((inputs["input_ids"] == 480).sum())
    visual = model.visual_tokens(pixels, [size])[0]
    assert placeholders == len(visual)


@pytest.mark.parametrize("mode", ["vicuna_v1", "mistral_instruct", "llava_llama_2", "chatml_direct", "qwen_1_5"])
def test_chat_templates(mode: str, tokenizers):
    """The prompts of the conversation template, with one image and two turns."""
    conversation = conv_templates[mode].copy()
    for index, text in enumerate(["<image>\nWhat?", "A cat.", "Sure?", None]):
        conversation.append_message(conversation.roles[index % 2], text)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    template = chat_template(conv_templates[mode])

    def render(turns: list[dict[str, Any]], **options: Any) -> str:
        return tokenizers[False].apply_chat_template(turns, chat_template=template, tokenize=False, **options)

    assert render(messages, add_generation_prompt=True) == conversation.get_prompt()
    conversation.messages.pop()
    assert render(messages) == conversation.get_prompt()
    with pytest.raises(Exception, match="its own system text"):
        render([{"role": "system", "content": "Be brief."}, *messages])

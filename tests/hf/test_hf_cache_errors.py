"""What a zipped model of transformers refuses behind a cache: masks, drafts and rows that do not fit what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import PAD, TEXTS, llava, llava_batch, llava_processor, one_image, pictures
from torch import Tensor
from transformers import StaticCache

from visionzip import visionzip

K, M = 4, 2
TEXT = "what is <image> here"


@pytest.mark.parametrize("static", [False, True])
def test_a_decoding_loop_of_ones_own_with_the_long_mask(static: bool, model: Any):
    """Positions of the mask no longer are those of the cache; that must not go unnoticed where it masks something."""
    processor = llava_processor()
    images = pictures((90, 60), (60, 90))
    inputs = processor(images=images, text=["<image>", "longer <image>"], padding=True, return_tensors="pt")
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    cache = model(**inputs, past_key_values=cache).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with pytest.raises(
        ValueError, match="attention_mask has 25 positions, but the cache holds 14 tokens and 1 are new"
    ):
        model(input_ids=torch.tensor([[9], [9]]), attention_mask=mask, past_key_values=cache)


def test_a_cache_that_does_not_fit():
    model, inputs = visionzip(llava(), K, M), one_image()
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match="holds 20 tokens, and the prompt has 20 when zipped, so nothing in it is new"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    text = {name: torch.cat([inputs[name], inputs[name][:, :3]], dim=1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="With a cache of earlier turns, pass the new tokens alone"):
        model.generate(**text, past_key_values=cache, max_new_tokens=2)
    cache.crop(-8)
    with pytest.raises(ValueError, match="holds 12 tokens, which ends inside image 0"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=2)


def test_continuous_batching(model: Any):
    with pytest.raises(ValueError, match=r"^cache_implementation='paged' is .*, without their images"):
        model.generate(**one_image(), cache_implementation="paged")


@pytest.mark.parametrize("place", ["argument", "generation config"])
@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_behind_a_cache(name: str, place: str, model: Any):
    """Transformers feeds a whole conversation again then; new tokens alone it feeds once."""
    inputs = one_image()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    turn = model.generate(**inputs, **options, return_dict_in_generate=True)
    conversation = torch.cat([turn.sequences, torch.full((1, 3), 9)], dim=1)
    everything = {"input_ids": conversation, "pixel_values": inputs["pixel_values"]}
    expected = model.generate(**everything, **options)[:, -6:]
    drafts = {name: 3 if name.startswith("prompt") else llava(seed=1)}
    if place == "generation config" and name.startswith("prompt"):
        model.generation_config.prompt_lookup_num_tokens = drafts.pop(name)
    cache = turn.past_key_values
    text = {"input_ids": torch.full_like(conversation, 9)}
    embeds = {"inputs_embeds": model.get_input_embeddings()(text["input_ids"])}
    for whole in (everything, everything | {"attention_mask": torch.ones_like(conversation)}, text, embeds):
        message = rf"^{name} does not go with past_key_values of earlier turns \({cache.get_seq_length()} positions\)"
        with pytest.raises(ValueError, match=message):
            model.generate(**whole, past_key_values=cache, **drafts, **options)
    new = {"input_ids": conversation[:, -4:]}
    new["attention_mask"] = torch.ones(1, cache.get_seq_length() + 4, dtype=torch.long)
    assert torch.equal(model.generate(**new, past_key_values=cache, **drafts, **options)[:, -6:], expected)


def two_turns(model: Any, image: bool) -> tuple[Any, dict[str, Tensor], Tensor]:
    """The cache of a first turn, the new tokens alone of a second, with an image or without, and all tokens so far."""
    processor = llava_processor()
    first = processor(images=pictures((90, 60)), text=TEXT, return_tensors="pt")
    turn = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    text = " and <image>" if image else " more"
    images = pictures((60, 90)) if image else None
    second = processor(images=images, text=text, add_special_tokens=False, return_tensors="pt")
    second["input_ids"] = torch.cat([turn.sequences[:, -1:], second["input_ids"]], dim=1)
    conversation = torch.cat([turn.sequences, second["input_ids"][:, 1:]], dim=1)
    return turn.past_key_values, {key: second[key] for key in second if key != "attention_mask"}, conversation


@pytest.mark.parametrize("image", [False, True])
def test_new_tokens_alone_with_the_long_mask(image: bool, model: Any):
    """Positions follow from the mask in ``generate``, so that even one without zeros would move them."""
    cache, new, conversation = two_turns(model, image)
    held, count = cache.get_seq_length(), new["input_ids"].shape[1]
    message = f"has {conversation.shape[1]} positions, but the cache holds {held} tokens and {count} are new"
    with pytest.raises(ValueError, match=message):
        model.generate(**new, attention_mask=torch.ones_like(conversation), past_key_values=cache, max_new_tokens=2)


def test_new_tokens_with_an_image_and_a_mask_of_another_conversation(model: Any):
    cache, new, _ = two_turns(model, image=True)
    mask = torch.ones(1, cache.get_seq_length() + new["input_ids"].shape[1] - 4, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=f"has {mask.shape[1]} positions, but the cache holds"):
        model(**new, attention_mask=mask, past_key_values=cache)


def test_a_batch_with_a_cache_of_a_loop_of_ones_own(model: Any):
    """Where its padding is only ``generate`` knows; without any, the prompts say what it holds."""
    inputs = llava_batch(texts=TEXTS[:2])
    cache = model(**inputs).past_key_values
    conversation = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((2, 2), 9)], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1),
        "pixel_values": inputs["pixel_values"],
    }
    with pytest.raises(
        ValueError, match="tokens of each prompt, but not which ones are padding: with prompts of several lengths"
    ):
        model.generate(**conversation, past_key_values=cache, max_new_tokens=2)
    equal = llava_batch(texts=["<image> a", "<image> b"])
    cache = model(**equal).past_key_values
    conversation = {"input_ids": torch.cat([equal["input_ids"], torch.full((2, 2), 9)], dim=1)}
    conversation |= {"pixel_values": equal["pixel_values"], "max_new_tokens": 2}
    assert torch.equal(model.generate(**conversation, past_key_values=cache), model.generate(**conversation))


def test_a_second_turn_that_is_padded_anew(model: Any):
    """The cache has its tokens where they were. A prompt alone has no padding there, so that it may change."""
    inputs = llava_batch(texts=TEXTS[:2])
    turn = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    pad, new = torch.full((2, 1), PAD), torch.full((2, 3), 9)
    conversation = {"input_ids": torch.cat([pad, turn.sequences, new], dim=1), "pixel_values": inputs["pixel_values"]}
    with pytest.raises(ValueError, match=r"prompt 0 begins in column 22, and when .* began in 21: put new tokens"):
        model.generate(**conversation, past_key_values=turn.past_key_values, max_new_tokens=2)
    inputs = llava_batch(texts=TEXTS[:1])
    turn = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([pad[:1], turn.sequences, new[:1]], dim=1)
    conversation = {"input_ids": ids, "pixel_values": inputs["pixel_values"], "max_new_tokens": 2}
    found = model.generate(**conversation, past_key_values=turn.past_key_values)
    assert torch.equal(found, model.generate(**conversation))


def test_a_cache_that_is_emptied_and_used_for_other_prompts(model: Any):
    """What ``generate`` noted on it does not outlive its tokens."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    model.generate(**llava_batch(texts=TEXTS[:2]), past_key_values=cache, max_new_tokens=2)
    cache.reset()
    text = llava_processor()(text=["a" * 40, "b" * 40], return_tensors="pt")
    model(**text, past_key_values=cache)
    image = llava_processor()(images=pictures((90, 60), (60, 90)), text=["<image>"] * 2, return_tensors="pt")
    conversation = {
        "input_ids": torch.cat([text["input_ids"], image["input_ids"]], dim=1),
        "pixel_values": image["pixel_values"],
        "max_new_tokens": 2,
    }
    assert torch.equal(model.generate(**conversation, past_key_values=cache), model.generate(**conversation))

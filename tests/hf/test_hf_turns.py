"""``generate`` of a zipped model of transformers in later turns, with the cache of those before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import IMAGES, PAD, TEXTS, answers, llava_batch, llava_processor
from torch import Tensor
from transformers import DynamicCache


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("image", [True, False])
def test_a_second_turn_with_the_cache_of_the_first(whole: bool, image: bool, model: Any):
    """The whole conversation with all its images, or the new tokens alone, which may have an image."""
    processor = llava_processor()
    first = processor(images=IMAGES[:1], text="<image> one", return_tensors="pt")
    out = model.generate(**first, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    more = " and <image> two" if image else " and more"
    second = processor(images=IMAGES[1:2] if image else None, text=more, add_special_tokens=False, return_tensors="pt")
    conversation = torch.cat([out.sequences, second["input_ids"]], dim=1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]]) if image else first["pixel_values"]
    everything = {"input_ids": conversation, "pixel_values": pixels, "attention_mask": torch.ones_like(conversation)}
    expected = answers(model, everything)
    if whole:
        assert torch.equal(answers(model, everything, past_key_values=cache), expected)
        return
    # The last token of the first answer is not in the cache yet.
    new = torch.cat([out.sequences[:, -1:], second["input_ids"]], dim=1)
    mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
    own = {"pixel_values": second["pixel_values"]} if image else {}
    found = answers(model, {"input_ids": new, "attention_mask": mask, **own}, past_key_values=cache)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ended_early", [False, True])
def test_a_second_turn_of_a_batch_with_the_cache_of_the_first(ended_early: bool, side: str, model: Any):
    """Rows get images, or none, and padding in either turn; an answer that ended early may be masked behind its end."""
    first = llava_batch(side, ["<image> a", "bb <image> longer", "no image"])
    turn = model.generate(**first, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    processor = llava_processor(side)
    texts = ["and <image>", "or", "a longer question"]
    second = processor(images=IMAGES[3:4], text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
    said = torch.ones(3, 4, dtype=torch.long)
    if ended_early:
        said[1, 2:] = 0
    conversation = {
        "input_ids": torch.cat([turn.sequences, second["input_ids"]], dim=1),
        "attention_mask": torch.cat([first["attention_mask"], said, second["attention_mask"]], dim=1),
        "pixel_values": torch.stack([first["pixel_values"][0], *second["pixel_values"], first["pixel_values"][1]]),
    }
    expected = answers(model, conversation)
    assert torch.equal(answers(model, conversation, past_key_values=turn.past_key_values), expected)


def test_a_third_turn_of_a_batch_whose_rows_have_images_in_different_turns(model: Any):
    """The cache has padding in front of either turn: its length alone does not say which tokens are in it."""
    processor, cache = llava_processor(), DynamicCache(config=model.config)
    turns = [["<image> a", "no image"], ["and a long question", "<image> b"], ["why is that so", "where and when"]]
    sofar: dict[str, Tensor] = {}
    for texts, images in zip(turns, (IMAGES[:1], IMAGES[1:2], None), strict=True):
        new = processor(images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
        for name, values in new.items():
            dim = 0 if name == "pixel_values" else 1
            sofar[name] = torch.cat([sofar[name], values], dim=dim) if name in sofar else values
        out = model.generate(**sofar, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(out[:, -4:], answers(model, sofar, max_new_tokens=4, min_new_tokens=4))
        sofar["input_ids"] = out
        sofar["attention_mask"] = torch.cat([sofar["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)


def test_a_cache_that_is_cut(model: Any):
    """Behind the end of an answer, or before its beginning to have another one."""
    first = llava_batch()
    length = first["input_ids"].shape[1]
    six = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    turn = model.generate(**first, **six, return_dict_in_generate=True)
    cache = turn.past_key_values
    cache.crop(-3)  # the sixth token is not in it yet
    ids = torch.cat([turn.sequences[:, : length + 2], torch.full((len(TEXTS), 3), 9)], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(len(TEXTS), 5, dtype=torch.long)], dim=1)
    conversation = {**first, "input_ids": ids, "attention_mask": mask}
    expected = answers(model, conversation)
    assert torch.equal(answers(model, conversation, past_key_values=copy.deepcopy(cache)), expected)
    cache.crop(-3)
    assert torch.equal(answers(model, first, past_key_values=cache, **six), turn.sequences[:, length:])


def test_a_second_turn_of_several_answers_to_each_prompt(model: Any):
    first, options = llava_batch(texts=TEXTS[:2]), {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}
    turn = model.generate(**first, **options, min_new_tokens=4, return_dict_in_generate=True)
    said = torch.ones(2, 7, dtype=torch.long)
    mask = torch.cat([first["attention_mask"], said], dim=1).repeat_interleave(2, dim=0)
    pixels = first["pixel_values"]
    conversation = {
        "input_ids": torch.cat([turn.sequences, torch.full((4, 3), 9)], dim=1),
        "attention_mask": mask,
        "pixel_values": torch.cat([pixels[:1], pixels[:1], pixels[1:], pixels[1:]]),
    }
    expected = answers(model, conversation)
    assert torch.equal(answers(model, conversation, past_key_values=turn.past_key_values), expected)


def test_a_penalty_on_the_new_tokens_of_a_padded_row(model: Any):
    """The mask of the cache is longer than the ids: what it masks is not among them."""
    texts, penalty = ["<image> a", "<image> and a much longer question"], {"repetition_penalty": 0.1}
    six = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def second_turn(texts: list[str], images: list[Any]) -> Tensor:
        first = llava_processor()(images=images, text=texts, padding=True, return_tensors="pt")
        cache = model.generate(**first, **six, return_dict_in_generate=True).past_key_values
        padding = (first["attention_mask"] == 0).sum(1)
        mask = torch.arange(cache.get_seq_length() + 3).expand(len(texts), -1) >= padding[:, None]
        new = {"input_ids": torch.tensor([[9, 10, 11]] * len(texts)), "attention_mask": mask.long()}
        return model.generate(**new, past_key_values=cache, **six, **penalty)[:, 3:]

    alone = [second_turn([text], [image]) for text, image in zip(texts, IMAGES[:2], strict=True)]
    assert torch.equal(second_turn(texts, IMAGES[:2]), torch.cat(alone))


def test_the_whole_conversation_after_a_turn_of_new_tokens_alone(model: Any):
    first = llava_batch(texts=["<image> a", "<image> b"])
    turn = model.generate(**first, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache, texts = turn.past_key_values, ["and <image>", "or no image at all"]
    second = llava_processor()(
        images=IMAGES[2:3], text=texts, padding=True, add_special_tokens=False, return_tensors="pt"
    )
    said = torch.cat([torch.ones(2, 1, dtype=torch.long), second["attention_mask"]], dim=1)
    new = {
        "input_ids": torch.cat([turn.sequences[:, -1:], second["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones(2, cache.get_seq_length(), dtype=torch.long), said], dim=1),
        "pixel_values": second["pixel_values"],
    }
    more = answers(model, new, past_key_values=cache, max_new_tokens=3, min_new_tokens=3)
    ones = torch.ones(2, 6, dtype=torch.long)
    conversation = {
        "input_ids": torch.cat([turn.sequences, second["input_ids"], more, torch.full((2, 3), 9)], dim=1),
        "attention_mask": torch.cat([first["attention_mask"], ones[:, :4], second["attention_mask"], ones], dim=1),
        "pixel_values": torch.stack([first["pixel_values"][0], *second["pixel_values"], first["pixel_values"][1]]),
    }
    assert torch.equal(answers(model, conversation, past_key_values=cache), answers(model, conversation))


def test_a_second_turn_after_equal_prompts_of_which_one_was_answered_early(model: Any):
    first = llava_batch(texts=["<image> a", "<image> b"])
    turn = model.generate(**first, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    turn.sequences[1, -2:] = PAD
    conversation = {
        "input_ids": torch.cat([turn.sequences, torch.full((2, 3), 9)], dim=1),
        "pixel_values": first["pixel_values"],
    }
    expected = answers(model, conversation)  # the mask is inferred
    for cache in (copy.deepcopy(turn.past_key_values), turn.past_key_values):
        assert torch.equal(answers(model, conversation, past_key_values=cache), expected)

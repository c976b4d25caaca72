"""What a zipped model of transformers refuses: calls whose parts do not fit together, each with the cure named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import FAMILIES, PAD, TEXTS, both, llava, llava_batch, llava_processor, pictures
from hf_video_models import build, processor_for, video
from torch import Tensor
from transformers import StaticCache

from visionzip import visionzip

K, M = 4, 2
TEXT = "what is <image> here"


@pytest.fixture
def model() -> Any:
    return visionzip(llava(), K, M)


def one_image() -> Any:
    return llava_processor()(images=pictures((90, 60)), text=TEXT, return_tensors="pt")


def without(name: str) -> Any:
    return lambda inputs: {key: value for key, value in inputs.items() if key != name}


def cut(inputs: Any) -> dict[str, Tensor]:
    return {**inputs, "input_ids": inputs["input_ids"][:, :20], "attention_mask": inputs["attention_mask"][:, :20]}


def more_images(inputs: Any) -> dict[str, Tensor]:
    return {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}


def no_placeholders(inputs: Any) -> dict[str, Tensor]:
    return {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 9)}


def fewer_images(inputs: Any) -> dict[str, Tensor]:
    ids = inputs["input_ids"].repeat(1, 2)
    return {"input_ids": ids, "pixel_values": inputs["pixel_values"]}


def other_size(inputs: Any) -> dict[str, Tensor]:
    return {**inputs, "pixel_values": inputs["pixel_values"][..., :42, :42]}


def other_dimensions(inputs: Any) -> dict[str, Tensor]:
    return {**inputs, "pixel_values": inputs["pixel_values"][None]}


def other_layer(inputs: Any) -> dict[str, Any]:
    return {**inputs, "vision_feature_layer": -1}


def four_dimensional_mask(inputs: Any) -> dict[str, Tensor]:
    length = inputs["input_ids"].shape[1]
    return {**inputs, "attention_mask": torch.ones(1, 1, length, length)}


MISFITS = [
    (without("pixel_values"), r"the prompts have 16 image placeholders \(id 3\), but no pixel_values were given"),
    (cut, r"prompt 0 has a run of 11 image placeholders .* takes 16 \(image 0 .*do not truncate it, or raise max_len"),
    (more_images, r"\(id 3\) for 1 of 2 images: give as many images as the prompts have <image>, in order, from the"),
    (no_placeholders, r"the prompts have placeholders \(id 3\) for 0 of 1 images: .* may have another id"),
    (fewer_images, "prompt 0 has more runs of image placeholders .* than there are images: 1 were given"),
    (other_size, r"pixel_values must be \(N, 3, 56, 56\) for this model, got \(1, 3, 42, 42\): .* own processor"),
    (other_dimensions, r"pixel_values must be \(N, 3, 56, 56\) for this model, got \(1, 1, 3, 56, 56\)"),
    (other_layer, r"vision_feature_layer=-1 was given, .* call visionzip\(model, layer=…\), or unzip"),
    (four_dimensional_mask, r"attention_mask has shape \(1, 1, 30, 30\) .* takes \(B, L\)"),
]


@pytest.mark.parametrize("change, message", MISFITS, ids=[getattr(row[0], "__name__", "no pixels") for row in MISFITS])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_inputs_that_do_not_fit(change: Any, message: str, call: str):
    model = visionzip(llava(), K, M)
    inputs = change(one_image())
    with pytest.raises(ValueError, match=message):
        model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2)


def call_with(model: Any, call: str, inputs: Any) -> Any:
    return model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2)


@both
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_pixels_that_are_no_numbers(call: str, family: str):
    """As in-tree models refuse them; without, the answer is made of zeros."""
    build_model, build_processor = FAMILIES[family]
    model = visionzip(build_model(), K, M)
    inputs = build_processor()(images=pictures((90, 60), (60, 90)), text="<image> or <image>", return_tensors="pt")
    for value in (torch.nan, torch.inf):
        inputs["pixel_values"][1].view(-1)[0] = value
        with pytest.raises(ValueError, match=r"^pixel_values\[1\] has 1 pixels that are NaN or infinite, of \d+:"):
            call_with(model, call, inputs)
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^pixel_values are torch\.uint8: raw pixels are not normalised"):
        call_with(model, call, inputs)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_frames_that_are_no_numbers(call: str):
    model = visionzip(build("video_llava"), K, M)
    inputs = processor_for("video_llava")(text="<video> <video>", videos=[video(0), video(1)], return_tensors="pt")
    inputs["pixel_values_videos"][1, 2, 0, 0, 0] = -torch.inf
    with pytest.raises(ValueError, match=r"^pixel_values_videos\[1\] has 1 pixels that are NaN or infinite"):
        call_with(model, call, inputs)


def test_pixels_and_tokens_are_looked_at_once_for_an_answer(model: Any, monkeypatch: pytest.MonkeyPatch):
    """Not in each step, as every look waits for the device."""
    looks, isfinite = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda values: looks.append(values.shape) or isfinite(values))
    model.generate(**one_image(), max_new_tokens=6, min_new_tokens=6)
    pixels, tokens = looks
    assert pixels == (1, 3, 56, 56) and tokens[0] < 17
    model(**one_image())
    assert looks == [pixels, tokens] * 2


@pytest.mark.parametrize(
    "changes, length",
    [({"num_additional_image_tokens": 0}, 15), ({"vision_feature_select_strategy": None}, 17), ({"patch_size": 7}, 64)],
    ids=str,
)
def test_the_processor_of_another_model(changes: dict[str, Any], length: int):
    inputs = llava_processor(**changes)(images=pictures((90, 60)), text=TEXT, return_tensors="pt")
    message = f"a run of {length} image placeholders .* this model takes 16 .* of another model \\(patch_size, num_add"
    with pytest.raises(ValueError, match=message):
        visionzip(llava(), K, M)(**inputs)


def test_labels_and_positions_of_another_length():
    inputs = one_image()
    for name in ("labels", "position_ids"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(1, 5\), but the prompts have \(1, 30\)"):
            visionzip(llava(), K, M)(**inputs, **{name: torch.zeros(1, 5, dtype=torch.long)})


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


def test_arguments_that_point_into_the_prompt(model: Any):
    """Their positions are those of the long prompt; a number of logits counts from the end and is welcome."""
    inputs = one_image()
    ends = torch.tensor([0, inputs["input_ids"].shape[1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"logits_to_keep has positions in the prompts, .* give a number"):
        model(**inputs, logits_to_keep=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q and cu_seq_lens_k count tokens .* leave them out"):
        model(**inputs, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_embeddings_beside_pixels(call: str, with_ids: bool, model: Any):
    inputs = one_image()
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    if not with_ids:
        del inputs["input_ids"]
    with pytest.raises(ValueError, match="input_ids"):
        getattr(model, call)(**inputs)


def test_a_zipped_assistant():
    """Transformers gives it placeholders without their images; unzipped it may help, and with text it does."""
    assistant = visionzip(llava(seed=1), K, M)
    model, options = llava(), {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match=r"cannot assist with prompts that have images, .*: unzip\(assistant_model\)"):
        model.generate(**one_image(), assistant_model=assistant, **options)
    text = llava_processor()(text="no picture", return_tensors="pt")
    assert torch.equal(model.generate(**text, assistant_model=assistant, **options), model.generate(**text, **options))


def test_no_prompts():
    inputs = {name: value[:0] for name, value in one_image().items()}
    with pytest.raises(ValueError, match=r"input_ids must be \(B, L\) with B >= 1, got \(0, 30\)"):
        visionzip(llava(), K, M)(**inputs)

"""What a zipped model of transformers refuses: calls whose parts do not fit together, each with the cure named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import FAMILIES, both, llava, llava_processor, one_image, pictures
from hf_video_models import build, processor_for, video
from torch import Tensor

from visionzip import visionzip

K, M = 4, 2
TEXT = "what is <image> here"


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

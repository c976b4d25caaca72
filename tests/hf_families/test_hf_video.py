"""What holds for every family of transformers that takes videos: LLaVA-OneVision, LLaVA-NeXT-Video and VideoLlava."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attaching import classes_of
from hf_plain import text_labels
from hf_video_models import FAMILIES, build, processor_for, video
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, pipeline

from checkpoints import picture
from visionzip import unzip, visionzip

EDGES = {"onevision": 70, "next_video": 84, "video_llava": 56}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return build(family, edge=EDGES[family])


@pytest.fixture
def processor(family: str) -> Any:
    return processor_for(family, edge=EDGES[family])


@pytest.fixture
def mixed(processor: Any) -> Any:
    """Rows of different length: an image and a video; a video; text."""
    text, videos = ["<image> and <video>?", "<video>", "no picture at all here"], [video(0), video(1)]
    return processor(text=text, images=picture(0), videos=videos, padding=True, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_equals_single_rows(family: str, model: Any, padding_side: str):
    processor = processor_for(family, edge=EDGES[family], padding_side=padding_side)
    first = {"text": "<video> is longer", "videos": [video(0)]}
    second = {"text": "<image>", "images": [picture(0)]}
    both = {"text": [first["text"], second["text"]], "videos": first["videos"], "images": second["images"]}
    visionzip(model, 4, 2)
    batch = model(**processor(**both, padding=True, return_tensors="pt")).logits
    for row, single in zip(batch, (first, second), strict=True):
        expected = model(**processor(**single, return_tensors="pt")).logits[0]
        own = row[-len(expected) :] if padding_side == "left" else row[: len(expected)]
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 16}, {"use_cache": False}],
    ids=["static cache", "prefill in chunks", "no cache"],
)
def test_answers_do_not_depend_on_how_they_are_computed(model: Any, mixed: Any, options: dict[str, Any]):
    expected = visionzip(model, 4, 2).generate(**mixed, **GREEDY)
    assert torch.equal(model.generate(**mixed, **GREEDY, **options), expected)


@torch.no_grad()
def test_a_second_turn_with_the_cache_of_the_first(model: Any, processor: Any):
    first = processor(text="<video> what?", videos=[video(0)], return_tensors="pt")
    visionzip(model, 4, 2)
    turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    later = {"text": "<video> what? And <video>, <image>?", "videos": [video(0), video(1)], "images": picture(0)}
    second = processor(**later, return_tensors="pt")
    new = second["input_ids"][:, first["input_ids"].shape[1] :]
    second["input_ids"] = torch.cat([turn.sequences, new], dim=1)
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    alone = model.generate(**second, **GREEDY)
    assert torch.equal(model.generate(**second, **GREEDY, past_key_values=turn.past_key_values), alone)


@torch.no_grad()
def test_the_pipeline_answers_as_the_model(model: Any, processor: Any):
    inputs = processor(text="<image> hi", images=picture(0), return_tensors="pt")
    answer = visionzip(model, 4, 2).generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    (said,) = ask(text="<image> hi", images=[picture(0)], return_full_text=False, generate_kwargs=GREEDY)
    assert said["generated_text"] == processor.decode(answer[0], skip_special_tokens=True)


@torch.no_grad()
def test_unzip_is_exact(model: Any, mixed: Any):
    before, attributes = model(**mixed).logits, vars(model).keys() | vars(model.model).keys()
    assert visionzip(model, 4, 2)(**mixed).logits.shape[1] < before.shape[1]
    assert torch.equal(unzip(model)(**mixed).logits, before)
    assert vars(model).keys() | vars(model.model).keys() == attributes
    assert not hasattr(model.config, "visionzip")


@torch.no_grad()
def test_a_saved_model_comes_back_zipped(model: Any, mixed: Any, tmp_path: Path):
    expected = visionzip(model, 4, 2, merge="average")(**mixed).logits
    model.save_pretrained(tmp_path)
    loaded = visionzip(AutoModelForImageTextToText.from_pretrained(tmp_path))
    assert torch.equal(loaded(**mixed).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_setting_of_its_own(model: Any, mixed: Any, duplicate: Callable[[nn.Module], nn.Module]):
    expected = visionzip(model, 4, 2)(**mixed).logits
    copied = duplicate(model)
    assert torch.equal(copied(**mixed).logits, expected)
    assert unzip(copied)(**mixed).logits.shape[1] > expected.shape[1]
    assert torch.equal(model(**mixed).logits, expected)


@torch.no_grad()
def test_every_attention_kernel_keeps_the_same_tokens(model: Any, mixed: Any):
    expected = visionzip(model, 4, 2)(**mixed).logits[:, -1]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**mixed).logits[:, -1], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision(model: Any, mixed: Any):
    expected = visionzip(model, 4, 2)(**mixed).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**mixed).logits.shape == expected.shape
    logits = model.to(torch.bfloat16)(**mixed).logits
    assert logits.dtype == torch.bfloat16
    assert logits.shape == expected.shape


@torch.no_grad()
def test_an_adapter_around_the_model(model: Any, mixed: Any):
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    expected = visionzip(model, 4, 2).generate(**mixed, **GREEDY)
    assert torch.equal(visionzip(adapted, 4, 2).generate(**mixed, **GREEDY), expected)  # a new adapter changes nothing
    assert torch.equal(adapted(**mixed).logits, model(**mixed).logits)


def test_gradient_checkpointing_changes_no_gradient(model: Any, mixed: Any):
    visionzip(model, 4, 2)
    checkpointed = copy.deepcopy(model).train()
    checkpointed.gradient_checkpointing_enable()
    for each in (model, checkpointed):
        each(**mixed, labels=text_labels(mixed), use_cache=False).loss.backward()
    projectors = [each.model.multi_modal_projector.linear_1.weight.grad for each in (model, checkpointed)]
    assert projectors[0].abs().sum() > 0
    assert torch.equal(*projectors)


def test_no_class_is_modified(model: Any, mixed: Any):
    before = classes_of(model)
    visionzip(model, 4, 2).generate(**mixed, **GREEDY)
    assert classes_of(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


MISSING = [
    ("onevision", "apply_pooling"),
    ("onevision", "pack_image_features"),
    ("onevision", "image_newline"),
    ("next_video", "vision_resampler"),
    ("video_llava", "image_tower"),
    ("video_llava", "video_tower"),
]


@pytest.mark.parametrize("family, name", MISSING, ids=str)
def test_a_missing_attribute_fails_at_once(family: str, name: str, monkeypatch: pytest.MonkeyPatch):
    """Another version of transformers must not fail in the middle of a generation."""
    model = build(family, edge=EDGES[family])
    monkeypatch.delattr(type(model.model) if hasattr(type(model.model), name) else model.model, name)
    with pytest.raises(TypeError, match=rf"of transformers .* has no {name}: VisionZip was tested with"):
        visionzip(model, 4, 2)

"""VisionZip on classes of transformers that it does not know by name: what it takes, and what it refuses beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from seam_models import BOS, END, IMAGE, START
from seam_walk import build, encode, prompts

from visionzip import visionzip
from visionzip.integrations.seam.maps import inspect_picture

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
ONE_SIZE, ANY_SIZE = "AyaVision", "Exaone4_5_"  # pooler_output is a tensor, and a list
M_ROPE = "PaddleOCRVL"


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and two rows of a prompt with an image each."""
    model = build(getattr(transformers, f"{name}ForConditionalGeneration"))
    given, lengths = encode(model)
    return model, prompts(lengths, given)


def test_a_method_has_to_be_named():
    model, _ = tiny(ONE_SIZE)
    with pytest.raises(
        ValueError, match=r"method='visionzip' reads the attention of .* AyaVision.*: use one of random, "
    ):
        visionzip(model, keep=0.5)
    with pytest.raises(ValueError, match="method='norm' with a size bias reads the attention"):
        visionzip(model, keep=0.5, method="norm", size_bias=True)
    with pytest.raises(ValueError, match="method='pool'"):
        visionzip(model, keep=0.5, method="pool")
    assert visionzip(model, keep=0.25, method="cen-prune").config.visionzip["method"] == "cen-prune"


@torch.no_grad()
@pytest.mark.parametrize("name", [ONE_SIZE, ANY_SIZE, M_ROPE])
def test_beams_and_a_reloaded_model(name: str, tmp_path: Any):
    model, inputs = tiny(name)
    visionzip(model, keep=0.5, method="divprune")
    said = model.generate(**inputs, **GREEDY, num_beams=2)
    assert torch.equal(said, model.generate(**inputs, **GREEDY, num_beams=2, use_cache=False))
    model.save_pretrained(tmp_path)
    again = visionzip(type(model).from_pretrained(tmp_path).eval())
    assert again.config.visionzip == model.config.visionzip
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_images_side_by_side_are_chosen_from_one_by_one():
    """In one stretch of placeholders, their grids say how long each is."""
    model, inputs = tiny(ANY_SIZE)
    visionzip(model, keep=0.5, method="random")
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    apart = model.get_image_features(**images).pooler_output
    assert [len(own) for own in apart] == [4, 2]
    seen: list[Any] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for between in ([], [50]):
        ids = torch.tensor([[BOS, START, *[IMAGE] * 8, *between, *[IMAGE] * 4, END]])
        model(input_ids=ids, **images)
    assert torch.equal(seen[0][0, 2:8], torch.cat(list(apart)))
    assert torch.equal(torch.cat([seen[1][0, 2:6], seen[1][0, 7:9]]), torch.cat(list(apart)))
    one = {"pixel_values": images["pixel_values"][32:], "image_grid_thw": images["image_grid_thw"][1:]}
    torch.testing.assert_close(model.get_image_features(**one).pooler_output[0], apart[1])  # whatever the batch


@torch.no_grad()
def test_what_cannot_be_told_is_refused_before_the_encoder_runs():
    model, inputs = tiny(ONE_SIZE)
    visionzip(model, keep=0.5, method="norm")
    ran: list[Any] = []
    model.model.vision_tower.register_forward_pre_hook(lambda *call: ran.append(call))
    ids = inputs["input_ids"]
    length = int((ids[0] == IMAGE).sum())
    rows = inputs | prompts([length] * 2, {}, cut=4)
    more = inputs | {"image_mask": torch.ones_like(ids)}
    for wrong, message in (
        (rows, f"the prompts have {length // 2} runs of image placeholders for 2 images: .* cut into rows"),
        (more, "image_mask .* has an entry for every token"),
        (inputs | {"input_features": torch.zeros(1, 4)}, "prompts with sound are not compressed"),
        (inputs | {"pixel_values_videos": torch.zeros(1, 4)}, "videos of this family are not compressed"),
        (inputs | {"input_ids": ids.masked_fill(ids == IMAGE, 50)}, "the prompts have 0 runs of image placeholders"),
    ):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**wrong)
    assert not ran


@torch.no_grad()
def test_images_in_another_order_than_their_placeholders_are_refused():
    """Also truncated ones; how many tokens an image has is known when the encoder has run."""
    model, inputs = tiny("Exaone4_5_")
    visionzip(model, keep=0.5, method="norm")
    swapped = {name: inputs[name].flip(0) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"images of \[4, 8\] placeholders where .* makes \[8, 4\] tokens"):
        model(**inputs | swapped)
    fewer = {name: inputs[name].clone() for name in swapped}
    fewer["input_ids"][0, 4] = 50
    fewer["input_ids"][0, 3] = 50
    with pytest.raises(ValueError, match="do not truncate prompts"):
        model(**inputs | fewer)


def test_classes_that_cannot_be_zipped_say_why():
    fuyu = build(transformers.FuyuForCausalLM)
    with pytest.raises(TypeError, match="FuyuForCausalLM reads last_hidden_state of its image encoder"):
        visionzip(fuyu, keep=0.5, method="norm")
    llama4 = build(transformers.Llama4ForConditionalGeneration)
    with pytest.raises(TypeError, match=r"Llama4.* has no base model with get_image_features as .model"):
        visionzip(llama4, keep=0.5, method="norm")
    text = build(transformers.Qwen3ForCausalLM)
    with pytest.raises(TypeError, match="any class of transformers whose forward takes mm_encoder_outputs"):
        visionzip(text)


def test_attention_of_an_encoder_of_which_nothing_is_known_is_not_shown():
    model, inputs = tiny(ONE_SIZE)
    visionzip(model, keep=0.5, method="cen-prune")
    with pytest.raises(ValueError, match=r"AyaVision.* has an encoder that VisionZip does not know"):
        inspect_picture(model, inputs, Image.new("RGB", (8, 8)))

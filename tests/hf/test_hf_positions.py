"""Original positions and the size bias on models of transformers."""

from __future__ import annotations

from typing import Any

import hf_video_models
import pytest
import torch
from hf_models import FAMILIES, IMAGE, IMAGES, PATCHES, VIDEO, content, llava, llava_batch, llava_processor
from hf_plain import plain_encode
from torch import Tensor, nn
from transformers import DynamicCache

from visionzip import unzip, visionzip
from visionzip.encoder import compress_images
from visionzip.integrations import family_of

K, M = 4, 2
KEPT = {"keep": 5, "method": "uniform"}  # patches 1, 4, 8, 11 and 14
PLACES = [(2 * slot + 1) * PATCHES // 10 for slot in range(5)]


def seen_by(model: Any) -> list[dict[str, Any]]:
    """Filled with what the language model is called with, call by call."""
    seen: list[dict[str, Any]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    return seen


def long_places(inputs: Any, row: int) -> list[int]:
    """The position of each short token of a prompt: its own in the long one, or that of the patch it keeps."""
    found, image = [], 0
    for position, token in enumerate(content(inputs, row).tolist()):
        if token != IMAGE or image % PATCHES in PLACES:
            found.append(position)
        image += token == IMAGE
    return found


# --- positions ---


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_tokens_stand_where_their_patches_were(side: str):
    """And text where it was: in forward and generate, padded on either side."""
    model, inputs = visionzip(llava(), **KEPT, positions="original"), llava_batch(side)
    seen = seen_by(model)
    model(**inputs)
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    forward, prefill, step, last = seen
    for row in range(len(inputs["input_ids"])):
        expected = long_places(inputs, row)
        for call in (forward, prefill):
            mask = call["attention_mask"][row].bool()
            assert call["position_ids"][row][mask].tolist() == expected
        length = len(content(inputs, row))
        assert step["position_ids"][row].tolist() == [length] and last["position_ids"][row].tolist() == [length + 1]


@torch.no_grad()
def test_a_batch_of_original_positions_equals_its_rows_and_the_plain_model():
    """Each row alone; and the plain language model on the kept features, at their positions."""
    model = visionzip(llava(), **KEPT, positions="original")
    inputs = llava_batch()
    batched = model(**inputs).logits
    plain = llava()
    compressed = compress_images(plain.model.vision_tower, inputs["pixel_values"], family_config(model))
    images = iter(plain.model.multi_modal_projector(compressed.tokens))
    for row in range(len(inputs["input_ids"])):
        ids = content(inputs, row)
        embeds = plain.get_input_embeddings()(ids)
        for start in range(len(ids)):
            if ids[start] == IMAGE and int((ids[:start] == IMAGE).sum()) % PATCHES == 0:
                embeds[[start + place for place in PLACES]] = next(images)
        places = long_places(inputs, row)
        expected = plain(
            inputs_embeds=embeds[places][None],
            position_ids=torch.tensor([places]),
            attention_mask=torch.ones(1, len(places)),
        ).logits[0]
        torch.testing.assert_close(batched[row, -len(places) :], expected, atol=1e-4, rtol=1e-4)


def family_config(model: Any) -> Any:
    return model._visionzip.config


@torch.no_grad()
def test_a_contextual_token_stands_at_its_target_and_cls_at_the_first_patch():
    model = visionzip(llava(), K, M, positions="original")
    inputs = llava_batch(texts=["<image> one"])
    seen = seen_by(model)
    model(**inputs)
    hidden, scores, keys = plain_encode(llava().model.vision_tower, inputs["pixel_values"])
    chosen = compress_images(model.model.vision_tower, inputs["pixel_values"], family_config(model))
    assert chosen.kept[0, 0] == 0  # CLS
    start = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    expected = [start + max(0, position - 1) for position in chosen.kept[0].tolist()]
    assert seen[0]["position_ids"][0, start : start + K + M].tolist() == expected
    assert scores.shape == (1, PATCHES) and keys.shape[:2] == hidden.shape[:2]


@torch.no_grad()
@pytest.mark.parametrize("setting", [{"positions": "original"}, {"positions": "original", "size_bias": True}], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_cached_answers_equal_those_without_a_cache(setting: dict[str, Any], options: dict[str, Any]):
    """Decoding goes on from the last token of the long prompt; without a cache everything is computed anew."""
    model, inputs = visionzip(llava(), **KEPT, **setting), llava_batch()
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    anew = {name: value for name, value in greedy.items() if name != "cache_implementation"} | {"use_cache": False}
    assert torch.equal(model.generate(**inputs, **greedy), model.generate(**inputs, **anew))


@torch.no_grad()
@pytest.mark.parametrize("setting", [{"positions": "original"}, {"size_bias": True}], ids=str)
@pytest.mark.parametrize("family", ["llava_next", "onevision", "next_video", "video_llava"])
def test_every_family_decodes_as_without_a_cache(family: str, setting: dict[str, Any]):
    """Also those whose model hands the ids to its base model by place, not by name."""
    if family in FAMILIES:
        make, processor = FAMILIES[family]
        model, inputs = make(), processor()(images=IMAGES[:1], text="a <image> b", return_tensors="pt")
    else:
        model, processor = hf_video_models.build(family), hf_video_models.processor_for(family)
        video = hf_video_models.video(0, 8 if family == "video_llava" else 3)
        inputs = processor(images=IMAGES[:1], videos=[video], text="a <image> or <video> b", return_tensors="pt")
    visionzip(model, **KEPT | {"keep": 2}, **setting)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    answer = model.generate(**inputs, **greedy)
    assert torch.equal(model.generate(**inputs, **greedy, use_cache=False), answer)
    inputs.pop("attention_mask")  # in training, too, a jump of positions begins no other prompt
    cached, alone = (model(**inputs, use_cache=use_cache).logits for use_cache in (True, False))
    torch.testing.assert_close(alone, cached, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_decoding_loop_of_ones_own():
    model = visionzip(llava(), **KEPT, positions="original", size_bias=True)
    inputs = llava_batch(texts=["a <image> b"])
    output = model(**inputs)
    said = [output.logits[:, -1:].argmax(-1)]
    while len(said) < 5:
        output = model(input_ids=said[-1], past_key_values=output.past_key_values)
        said.append(output.logits[:, -1:].argmax(-1))
    expected = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(torch.cat(said, dim=1), expected[:, -5:])


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size_bias", [True, False])
def test_three_turns_with_a_kept_cache(whole: bool, size_bias: bool):
    """Of a batch whose rows have images in different turns: what is new stands where it would without a cache."""
    model = visionzip(llava(), **KEPT, positions="original", size_bias=size_bias)
    processor, cache = llava_processor(), DynamicCache(config=model.config)
    turns = [["<image> a", "no image"], ["and a long question", "<image> b"], ["why is that so", "where and when"]]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    sofar: dict[str, Tensor] = {}
    held = torch.ones(2, 0, dtype=torch.long)  # mask of the cache
    for texts, images in zip(turns, (IMAGES[:1], IMAGES[1:2], None), strict=True):
        new = dict(processor(images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt"))
        last = sofar["input_ids"][:, -1:] if sofar else new["input_ids"][:, :0]
        for name, values in new.items():
            dim = 0 if name == "pixel_values" else 1
            sofar[name] = torch.cat([sofar[name], values], dim=dim) if name in sofar else values
        expected = model.generate(**sofar, **options)
        if whole:
            out = model.generate(**sofar, past_key_values=cache, **options)
        else:
            ids = torch.cat([last, new["input_ids"]], dim=1)  # the last answer's end is not in the cache yet
            mask = torch.cat([held, torch.ones_like(last), new["attention_mask"]], dim=1)
            out = model.generate(**new | {"input_ids": ids, "attention_mask": mask}, past_key_values=cache, **options)
        assert torch.equal(out[:, -4:], expected[:, -4:])
        if not whole:
            held = (cache._visionzip.grown(cache.get_seq_length()).columns >= 0).long()
        sofar["input_ids"] = torch.cat([sofar["input_ids"], expected[:, -4:]], dim=1)
        sofar["attention_mask"] = torch.cat([sofar["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)


@torch.no_grad()
def test_unzip_after_original_positions_and_a_size_bias():
    model, inputs = llava(), llava_batch()
    before = model(**inputs).logits
    zipped = visionzip(model, **KEPT, positions="original", size_bias=True)(**inputs).logits
    assert zipped.shape != before.shape
    assert torch.equal(unzip(model)(**inputs).logits, before)


def test_packed_prompts_do_not_go_with_original_positions():
    model, inputs = visionzip(llava(), **KEPT, positions="original"), llava_batch(texts=["a<image>b"])
    ids, pixels = inputs["input_ids"].repeat(1, 2), inputs["pixel_values"].repeat(2, 1, 1, 1)
    positions = torch.arange(ids.shape[1] // 2).repeat(1, 2)
    with pytest.raises(ValueError, match=r"position_ids start anew, .* give each prompt a row of its own"):
        model(input_ids=ids, pixel_values=pixels, position_ids=positions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_needs_text_behind_the_image(side: str):
    """``generate`` goes on from the last token, which is no image's end; a forward is told where that is."""
    model = visionzip(llava(), **KEPT, positions="original")
    with pytest.raises(ValueError, match=r"prompt 1 ends with an image.*put text behind it"):
        model.generate(**llava_batch(side, ["a <image> b, c and d", "b <image>"]))
    visionzip(model, positions="consecutive").generate(**llava_batch(texts=["b <image>"]), max_new_tokens=1)


# --- tiles ---


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next"])
def test_tokens_of_tiles_stand_in_the_stock_layout(family: str):
    """All patches of all tiles, in any order: each placeholder but the newlines is stood at; padding joins its edge."""
    make, processor = FAMILIES[family]
    inputs = processor()(images=IMAGES[:1], text="<image>", return_tensors="pt")
    plain = make()
    tokens = plain.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    newline = (tokens == plain.model.image_newline).all(dim=1)
    model = visionzip(make(), keep=PATCHES, method="uniform", positions="original")
    modality = family_of(model).modalities["image"]
    encoded = modality.encode(model.model, family_config(model), dict(inputs))
    found = encoded.places[0]
    assert set(found.tolist()) == set((~newline).nonzero().flatten().tolist())
    unpadded = (~newline).sum() == len(found)
    for place, token in zip(found.tolist(), encoded.tokens[0], strict=True):
        if unpadded or place < PATCHES:
            torch.testing.assert_close(token, tokens[place], atol=1e-4, rtol=1e-4)


# --- size bias ---


@torch.no_grad()
def test_sizes_reach_the_language_model():
    """A batch with two images and a row of text: 1 for text, and each image's sizes add up to its patches."""
    model, inputs = visionzip(llava(), **KEPT, size_bias=True), llava_batch()
    calls: list[Tensor | None] = []
    backbone: nn.Module = model.model.language_model
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs.get("token_sizes")), with_kwargs=True, prepend=True
    )
    model(**inputs)
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, num_beams=2)
    forward, prefill, *steps = calls
    assert steps == [None] * 2 and torch.equal(prefill, forward.repeat_interleave(2, dim=0))
    chosen = compress_images(model.model.vision_tower, inputs["pixel_values"], family_config(model))
    counts = [int((content(inputs, row) == IMAGE).sum()) // PATCHES for row in range(len(inputs["input_ids"]))]
    assert forward.sum(dim=1).tolist() == [forward.shape[1] + count * (PATCHES - 5) for count in counts]
    assert torch.equal(forward[forward > 1].sort().values, chosen.sizes[chosen.sizes > 1].sort().values)


def test_prompts_in_chunks_do_not_go_with_a_size_bias():
    model = visionzip(llava(), **KEPT, size_bias=True)
    with pytest.raises(ValueError, match=r"prefill_chunk_size cuts the prompt.*leave it out"):
        model.generate(**llava_batch(), prefill_chunk_size=7, past_key_values=DynamicCache(config=model.config))


@torch.no_grad()
def test_encoder_outputs_beside_pixels_are_refused():
    model, inputs = visionzip(llava(), K, M), llava_batch()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="mm_encoder_outputs were given beside pixels"):
            call(**inputs, mm_encoder_outputs={})


def test_flash_attention_takes_gaps_for_packed_prompts():
    model = llava()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes for the start of another"):
        visionzip(model, **KEPT, positions="original")

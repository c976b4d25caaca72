"""``visionzip`` on transformers' own ``LlavaForConditionalGeneration``: stock processor, stock calls, fewer tokens.

What does not depend on the family is tested here for all of them: what the language model sees, and what runs along
with the prompts of a ``forward``. ``generate`` is in ``test_hf_generate.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    BOS,
    IMAGE,
    IMAGES,
    PATCHES,
    TEXTS,
    content,
    llava,
    llava_batch,
    llava_processor,
    short_rows,
)
from hf_plain import plain_answers, plain_encode, plain_logits, plain_rows, plain_zip
from torch import Tensor
from transformers import StaticCache

from visionzip import unzip, visionzip

K, M = 4, 2


@pytest.fixture
def model() -> Any:
    return visionzip(llava(), K, M)


@torch.no_grad()
def reference_features(model: Any, pixels: Tensor) -> list[Tensor]:
    """Features (K + M, D) of each image."""
    zipped = plain_zip(*plain_encode(model.model.vision_tower, pixels), K, M)
    return [model.model.multi_modal_projector(tokens) for tokens, _ in zipped]


def reference_rows(model: Any, inputs: Any) -> list[Tensor]:
    """Embeddings of each prompt with its zipped images."""
    features = reference_features(model, inputs["pixel_values"]) if "pixel_values" in inputs else []
    return plain_rows(model, inputs, [(PATCHES, tokens) for tokens in features])


def short_lengths(inputs: Any) -> list[int]:
    return [len(row) for row in short_rows(inputs, K + M)]


def answers(model: Any, inputs: Any) -> Tensor:
    """The five new tokens of a greedy answer."""
    out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return out[:, inputs["input_ids"].shape[1] :]


# --- what the language model sees ---


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_visual_tokens_equal_the_plain_reference(siglip: bool, attention: str):
    model = visionzip(llava(siglip, attention), K, M)
    pixels = llava_batch()["pixel_values"]
    found = model.get_image_features(pixels)
    assert len(found.pooler_output) == len(pixels) and found.last_hidden_state.shape == (len(pixels), K + M, 32)
    for features, expected in zip(found.pooler_output, reference_features(model, pixels), strict=True):
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows_alone(side: str, model: Any):
    """Logits at every position, answers, and the lengths of prompt and KV cache, whichever side the padding is on."""
    inputs = llava_batch(side)
    lengths = short_lengths(inputs)
    output = model(**inputs)
    assert output.logits.shape[1] == output.past_key_values.get_seq_length() == max(lengths)
    rows = reference_rows(model, inputs)
    for row, length, embeddings in zip(output.logits, lengths, rows, strict=True):
        assert len(embeddings) == length
        own = row[-length:] if side == "left" else row[:length]
        torch.testing.assert_close(own, plain_logits(model, embeddings), atol=1e-4, rtol=1e-4)
    assert answers(model, inputs).tolist() == [answer for row in rows for answer in plain_answers(model, row, 5)]


def test_text_only_prompts_are_not_touched(model: Any):
    inputs = llava_batch(texts=["no picture", "none here either"])
    zipped = [model(**inputs).logits, answers(model, inputs)]
    unzip(model)
    assert torch.equal(zipped[0], model(**inputs).logits) and torch.equal(zipped[1], answers(model, inputs))


def test_the_encoder_stops_at_the_scored_layer(model: Any):
    ran = []
    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *args, index=index: ran.append(index))
    model(**llava_batch(texts=TEXTS[:1]))
    assert ran == [0, 1, 2]  # of four


# --- forward ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_run_along(side: str, model: Any):
    """The loss is that of the prompts' own labels; placeholders and padding have none."""
    inputs = llava_batch(side)
    ids = inputs["input_ids"]
    # The first token too: with padding before it, transformers has it predicted from that.
    hidden = (ids == IMAGE) | (ids == BOS) | (inputs["attention_mask"] == 0)
    labels = ids.masked_fill(hidden, -100)
    loss = model(**inputs, labels=labels).loss
    losses = []
    for embeddings, targets in zip(reference_rows(model, inputs), short_rows(inputs, K + M), strict=True):
        pairs = zip(plain_logits(model, embeddings), targets[1:], strict=False)
        losses += [F.cross_entropy(own, torch.tensor(token)) for own, token in pairs if token != IMAGE]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_arguments_by_position_and_without_a_mask(model: Any):
    inputs = llava_batch(texts=TEXTS[:1])
    expected = model(**inputs).logits
    assert torch.equal(model(inputs["input_ids"], inputs["pixel_values"]).logits, expected)
    assert torch.equal(
        model.model(**inputs).last_hidden_state, model(**inputs, output_hidden_states=True).hidden_states[-1]
    )


def test_rows_of_one_length_become_ragged(model: Any):
    """Without padding before, so on the left: the last position is each row's next token."""
    processor = llava_processor()
    inputs = processor(images=IMAGES[:1], text=["x<image>y", "z" * (PATCHES + 2)], return_tensors="pt")
    del inputs["attention_mask"]
    logits = model(**inputs).logits
    assert logits.shape[1] == PATCHES + 3
    single = model(input_ids=inputs["input_ids"][:1], pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(logits[0, -single.shape[1] :], single[0], atol=1e-5, rtol=1e-5)


def language_model_arguments(model: Any) -> dict[str, Any]:
    """Filled with what the language model is called with."""
    seen: dict[str, Any] = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    return seen


def test_positions_and_token_types_run_along(model: Any):
    inputs = llava_batch("right", return_mm_token_type_ids=True)
    ids = inputs["input_ids"]
    seen = language_model_arguments(model)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    model(**inputs, position_ids=positions + 7)
    lengths = short_lengths(inputs)
    for row, length in enumerate(lengths):
        assert seen["position_ids"][row, :length].tolist() == list(range(7, 7 + length))
        assert seen["attention_mask"][row].tolist() == [1] * length + [0] * (max(lengths) - length)
        images = int((content(inputs, row) == IMAGE).sum()) // PATCHES
        assert int(seen["mm_token_type_ids"][row].sum()) == images * (K + M)


def test_packed_positions_start_anew(model: Any):
    """Two prompts in one row, as packing makes them: each counts from 0."""
    inputs = llava_batch(texts=["a<image>b"])
    ids = inputs["input_ids"].repeat(1, 2)
    length = ids.shape[1] // 2
    seen = language_model_arguments(model)
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    model(input_ids=ids, pixel_values=pixels, position_ids=torch.arange(length).repeat(1, 2))
    assert seen["position_ids"].tolist() == [[*range(length - PATCHES + K + M)] * 2]


def test_embeddings_pass(model: Any):
    inputs = llava_batch(texts=TEXTS[:1])
    embeddings = reference_rows(model, inputs)[0][None]
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    new = model.generate(inputs_embeds=embeddings, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(new, answers(model, inputs))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_decoding_loop_of_ones_own(static: bool, model: Any):
    """Prefill with the stock inputs, then token by token."""
    inputs = llava_batch(texts=TEXTS[:1])
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    output = model(**inputs, past_key_values=cache)
    said = [output.logits[:, -1:].argmax(-1)]
    while len(said) < 5:
        output = model(input_ids=said[-1], past_key_values=output.past_key_values)
        said.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(said, dim=1), answers(model, inputs))


def test_logits_to_keep_counts_from_the_end(model: Any):
    inputs = llava_batch(texts=TEXTS[:1])
    every = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, every[:, -3:])

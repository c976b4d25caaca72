"""``visionzip`` on transformers' own ``LlavaForConditionalGeneration``: stock processor, stock calls, fewer tokens.

What does not depend on the family is tested here for all of them; the plain references are in ``hf_models.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    BOS,
    IMAGE,
    PAD,
    PATCHES,
    content,
    llava,
    llava_processor,
    pictures,
    reference_answer,
    reference_embeddings,
    reference_tokens,
    tokenizer,
)
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer
from transformers.generation import CompileConfig

from visionzip import unzip, visionzip

K, M = 4, 2
TEXTS = ["what is <image> here", "<image><image> two, side by side", "no picture", "a <image> b <image> c"]
IMAGES = pictures(*[(90, 60), (60, 90), (56, 56), (120, 40), (80, 80)])


@pytest.fixture
def model() -> Any:
    return visionzip(llava(), K, M)


def batch(side: str = "left", texts: list[str] = TEXTS, **options: Any) -> Any:
    """What the stock processor makes of prompts with one, two, no and two images."""
    count = sum(text.count("<image>") for text in texts)
    return llava_processor(side)(
        images=IMAGES[:count] or None, text=texts, padding=True, return_tensors="pt", **options
    )


def reference_rows(model: Any, inputs: Any) -> list[Tensor]:
    """Embeddings of each prompt with its zipped images."""
    images = iter(inputs.get("pixel_values", []))
    rows = []
    for row in range(len(inputs["input_ids"])):
        ids = content(inputs, row)
        runs = []
        for _ in range(int((ids == IMAGE).sum()) // PATCHES):
            tokens, _ = reference_tokens(model.model.vision_tower, next(images), K, M)
            runs.append((PATCHES, model.model.multi_modal_projector(tokens)))
        rows.append(reference_embeddings(model, ids, runs))
    return rows


def reference_logits(model: Any, embeddings: Tensor) -> Tensor:
    return model.lm_head(model.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state[0])


def short_row(inputs: Any, row: int) -> list[int]:
    """One prompt without padding, with K + M placeholders for each image."""
    ids, short = content(inputs, row).tolist(), []
    while ids:
        is_image = ids[0] == IMAGE
        short += [IMAGE] * (K + M) if is_image else ids[:1]
        ids = ids[PATCHES if is_image else 1 :]
    return short


def short_rows(inputs: Any) -> list[list[int]]:
    return [short_row(inputs, row) for row in range(len(inputs["input_ids"]))]


def short_lengths(inputs: Any) -> list[int]:
    return [len(row) for row in short_rows(inputs)]


def answers(model: Any, inputs: Any, **options: Any) -> Tensor:
    """The new tokens of a greedy answer."""
    out = model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False, **options})
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return out[:, inputs["input_ids"].shape[1] :]


def outputs(model: Any, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs).logits, answers(model, inputs)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- what the language model sees ---


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_visual_tokens_equal_the_plain_reference(siglip: bool, attention: str):
    model = visionzip(llava(siglip, attention), K, M)
    pixels = batch()["pixel_values"]
    found = model.get_image_features(pixels)
    assert len(found.pooler_output) == len(pixels) and found.last_hidden_state.shape == (len(pixels), K + M, 32)
    for image, features in zip(pixels, found.pooler_output, strict=True):
        tokens, _ = reference_tokens(model.model.vision_tower, image, K, M)
        torch.testing.assert_close(features, model.model.multi_modal_projector(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows_alone(side: str, model: Any):
    """Logits at every position, answers, and the lengths of prompt and KV cache, whichever side the padding is on."""
    inputs = batch(side)
    lengths = short_lengths(inputs)
    output = model(**inputs)
    assert output.logits.shape[1] == output.past_key_values.get_seq_length() == max(lengths)
    rows = reference_rows(model, inputs)
    for row, length, embeddings in zip(output.logits, lengths, rows, strict=True):
        assert len(embeddings) == length
        own = row[-length:] if side == "left" else row[:length]
        torch.testing.assert_close(own, reference_logits(model, embeddings), atol=1e-4, rtol=1e-4)
    new = answers(model, inputs)
    for row, embeddings in zip(new.tolist(), rows, strict=True):
        expected = reference_answer(model, embeddings, 5)
        assert row == expected + [PAD] * (5 - len(expected))


def test_one_prompt_and_its_cache(model: Any):
    inputs = batch(texts=TEXTS[:1])
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    text = inputs["input_ids"].shape[1] - PATCHES
    assert out.past_key_values.get_seq_length() == text + K + M + 3 - 1
    assert out.sequences.shape == (1, inputs["input_ids"].shape[1] + 3)


def test_text_only_prompts_are_not_touched(model: Any):
    inputs = batch(texts=["no picture", "none here either"])
    zipped = outputs(model, inputs)
    assert same(zipped, outputs(unzip(model), inputs))


def test_the_encoder_stops_at_the_scored_layer(model: Any):
    ran = []
    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *args, index=index: ran.append(index))
    model(**batch(texts=TEXTS[:1]))
    assert ran == [0, 1, 2]  # of four


# --- forward ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_run_along(side: str, model: Any):
    """The loss is that of the prompts' own labels; placeholders and padding have none."""
    inputs = batch(side)
    ids = inputs["input_ids"]
    # The first token too: with padding before it, transformers has it predicted from that.
    hidden = (ids == IMAGE) | (ids == BOS) | (inputs["attention_mask"] == 0)
    labels = ids.masked_fill(hidden, -100)
    loss = model(**inputs, labels=labels).loss
    losses = []
    for row, embeddings in enumerate(reference_rows(model, inputs)):
        logits, targets = reference_logits(model, embeddings), short_row(inputs, row)
        pairs = zip(logits, targets[1:], strict=False)
        losses += [F.cross_entropy(own, torch.tensor(token)) for own, token in pairs if token != IMAGE]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_arguments_by_position_and_without_a_mask(model: Any):
    inputs = batch(texts=TEXTS[:1])
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


def test_positions_and_token_types_run_along(model: Any, monkeypatch: pytest.MonkeyPatch):
    inputs = batch("right", return_mm_token_type_ids=True)
    ids = inputs["input_ids"]
    seen: dict[str, Tensor] = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
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
    inputs = batch(texts=["a<image>b"])
    ids = inputs["input_ids"].repeat(1, 2)
    length = ids.shape[1] // 2
    seen: dict[str, Tensor] = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    model(input_ids=ids, pixel_values=pixels, position_ids=torch.arange(length).repeat(1, 2))
    assert seen["position_ids"].tolist() == [[*range(length - PATCHES + K + M)] * 2]


def test_embeddings_and_decoding_steps_pass(model: Any):
    inputs = batch(texts=TEXTS[:1])
    embeddings = reference_rows(model, inputs)[0][None]
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    cache = model(**inputs).past_key_values
    step = model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    assert step.logits.shape[1] == 1
    new = model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False)
    assert torch.equal(new, answers(model, inputs))


# --- generate ---


def stock(model: Any, inputs: Any, **options: Any) -> Tensor:
    """The same answers by a model that is not zipped: prompts shortened by hand, features from the reference."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling  # noqa: PLC0415

    plain = unzip(copy.deepcopy(model))
    rows = short_rows(inputs)
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    features = [
        plain.model.multi_modal_projector(reference_tokens(plain.model.vision_tower, image, K, M)[0])
        for image in inputs["pixel_values"]
    ]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    out = plain.generate(input_ids=ids, attention_mask=mask, mm_encoder_outputs=encoded, **options)
    return out[:, longest:]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_ways_to_generate(options: dict[str, Any], model: Any):
    inputs = batch()
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    torch.manual_seed(0)
    out = model.generate(**inputs, **options)
    copies = len(out) // len(TEXTS)
    assert copies == options.get("num_return_sequences", 1)
    prompts, new = out[:, : inputs["input_ids"].shape[1]], out[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(prompts, inputs["input_ids"].repeat_interleave(copies, dim=0))
    torch.manual_seed(0)
    assert torch.equal(new, stock(model, inputs, **options))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 7}], ids=str)
def test_ways_to_generate_that_change_no_answer(options: dict[str, Any], model: Any):
    inputs = batch(texts=TEXTS[3:])
    if "prefill_chunk_size" in options:
        options["past_key_values"] = DynamicCache(config=model.config)
    assert torch.equal(answers(model, inputs, **options), answers(model, inputs))


def test_an_assistant_that_is_not_zipped(model: Any):
    """It is given the short prompt."""
    inputs = batch(texts=TEXTS[:1])
    assert torch.equal(answers(model, inputs, assistant_model=llava(seed=1)), answers(model, inputs))


def test_the_mask_is_inferred_from_padding(model: Any):
    inputs = batch()
    expected = answers(model, inputs)
    del inputs["attention_mask"]
    assert torch.equal(answers(model, inputs), expected)


def test_a_dict_with_scores(model: Any):
    inputs = batch()
    out = model.generate(
        **inputs, max_new_tokens=4, num_beams=2, return_dict_in_generate=True, output_scores=True, do_sample=False
    )
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    scores = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    assert scores.shape == (len(TEXTS), out.sequences.shape[1] - inputs["input_ids"].shape[1])


def test_lengths_count_the_users_prompt(model: Any):
    inputs = batch()
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_length=length + 2, do_sample=False).shape[1] == length + 2
    least = model.generate(**inputs, max_length=length + 9, min_length=length + 6, do_sample=False)
    assert least.shape[1] >= length + 6
    config = GenerationConfig(max_length=length + 4, pad_token_id=PAD)
    assert model.generate(**inputs, generation_config=config).shape[1] == length + 4
    assert config.max_length == length + 4
    model.generation_config.max_length = length + 3
    assert model.generate(**inputs, do_sample=False).shape[1] == length + 3
    with pytest.raises(ValueError, match="max_length"):
        model.generate(**inputs, max_length=length)


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamers_see_the_users_prompt_first(model: Any):
    inputs = batch(texts=TEXTS[:1])
    streamer = Recorder()
    new = answers(model, inputs, streamer=streamer)
    assert streamer.seen == [inputs["input_ids"][0].tolist(), *([token] for token in new[0].tolist())]
    assert streamer.ended
    texts = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=10)
    answers(model, inputs, streamer=texts)
    assert "".join(texts) == tokenizer().decode(new[0])


def test_criteria_and_processors_see_the_users_prompt(model: Any):
    inputs = batch()
    length, prompts = inputs["input_ids"].shape[1], inputs["input_ids"]
    seen = []

    def stop(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        seen.append(ids)
        return torch.full((len(ids),), ids.shape[1] >= length + 3)

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids)
        return scores

    def allowed(row: int, ids: Tensor) -> list[int]:
        assert torch.equal(ids[:length], prompts[row])
        return [7 + len(ids) - length]

    options = {"stopping_criteria": [stop], "logits_processor": [process], "prefix_allowed_tokens_fn": allowed}
    new = answers(model, inputs, max_new_tokens=9, **options)
    assert new.tolist() == [[7, 8, 9]] * len(TEXTS)
    assert len(seen) == 6 and all(torch.equal(ids[:, :length], prompts) for ids in seen)


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


def test_a_static_cache_of_the_zipped_length(model: Any):
    inputs = batch(texts=TEXTS[:1])
    room = inputs["input_ids"].shape[1] - PATCHES + K + M + 5
    cache = StaticCache(config=model.config, max_cache_len=room)
    assert torch.equal(answers(model, inputs, past_key_values=cache), answers(model, inputs))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled(model: Any):
    """A compiled model, and decoding steps compiled as one graph; aot_eager traces as inductor does."""
    inputs = batch(texts=TEXTS[:1])
    compiled = torch.compile(model, backend="aot_eager")
    for change in (lambda: visionzip(model, 5, 3), lambda: unzip(model), lambda: visionzip(compiled, K, M)):
        change()
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    settings = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True
    found = answers(model, inputs, cache_implementation="static", compile_config=settings)
    assert torch.equal(found, answers(model, inputs))

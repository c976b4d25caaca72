"""``generate`` of a zipped model of transformers: every way to ask, the user's own prompt in front of the answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import PAD, PATCHES, TEXTS, answers, llava, llava_batch, short_rows, tokenizer
from hf_plain import plain_encode, plain_zip
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer
from transformers.generation import CompileConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip import unzip, visionzip

K, M = 4, 2


def stock(model: Any, inputs: Any, **options: Any) -> Tensor:
    """The same answers by a model that is not zipped: prompts shortened by hand, features from the reference."""
    plain = unzip(copy.deepcopy(model))
    rows = short_rows(inputs, K + M)
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    zipped = plain_zip(*plain_encode(plain.model.vision_tower, inputs["pixel_values"]), K, M)
    features = [plain.model.multi_modal_projector(tokens) for tokens, _ in zipped]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    out = plain.generate(input_ids=ids, attention_mask=mask, mm_encoder_outputs=encoded, **options)
    return out[:, longest:]


def test_one_prompt_and_its_cache(model: Any):
    inputs = llava_batch(texts=TEXTS[:1])
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    text = inputs["input_ids"].shape[1] - PATCHES
    assert out.past_key_values.get_seq_length() == text + K + M + 3 - 1
    assert out.sequences.shape == (1, inputs["input_ids"].shape[1] + 3)


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
    inputs = llava_batch()
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
    inputs = llava_batch(texts=TEXTS[3:])
    if "prefill_chunk_size" in options:
        options["past_key_values"] = DynamicCache(config=model.config)
    assert torch.equal(answers(model, inputs, **options), answers(model, inputs))


def test_an_assistant_that_is_not_zipped(model: Any):
    """It is given the short prompt."""
    inputs = llava_batch(texts=TEXTS[:1])
    assert torch.equal(answers(model, inputs, assistant_model=llava(seed=1)), answers(model, inputs))


def test_the_mask_is_inferred_from_padding(model: Any):
    inputs = llava_batch()
    expected = answers(model, inputs)
    del inputs["attention_mask"]
    assert torch.equal(answers(model, inputs), expected)


def test_a_dict_with_scores(model: Any):
    inputs = llava_batch()
    out = model.generate(
        **inputs, max_new_tokens=4, num_beams=2, return_dict_in_generate=True, output_scores=True, do_sample=False
    )
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    scores = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    assert scores.shape == (len(TEXTS), out.sequences.shape[1] - inputs["input_ids"].shape[1])


def test_lengths_count_the_users_prompt(model: Any):
    inputs = llava_batch()
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
    inputs = llava_batch(texts=TEXTS[:1])
    streamer = Recorder()
    new = answers(model, inputs, streamer=streamer)
    assert streamer.seen == [inputs["input_ids"][0].tolist(), *([token] for token in new[0].tolist())]
    assert streamer.ended
    texts = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=10)
    answers(model, inputs, streamer=texts)
    assert "".join(texts) == tokenizer().decode(new[0])


def test_criteria_and_processors_see_the_users_prompt(model: Any):
    inputs = llava_batch()
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


def test_a_static_cache_of_the_zipped_length(model: Any):
    inputs = llava_batch(texts=TEXTS[:1])
    room = inputs["input_ids"].shape[1] - PATCHES + K + M + 5
    cache = StaticCache(config=model.config, max_cache_len=room)
    assert torch.equal(answers(model, inputs, past_key_values=cache), answers(model, inputs))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled(model: Any):
    """A compiled model, and decoding steps compiled as one graph; aot_eager traces as inductor does."""
    inputs = llava_batch(texts=TEXTS[:1])
    compiled = torch.compile(model, backend="aot_eager")
    for change in (lambda: visionzip(model, 5, 3), lambda: unzip(model), lambda: visionzip(compiled, K, M)):
        change()
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    settings = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True
    found = answers(model, inputs, cache_implementation="static", compile_config=settings)
    assert torch.equal(found, answers(model, inputs))

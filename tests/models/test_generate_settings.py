"""Every setting of transformers' ``generate`` on prompts given as embeddings: as alone in a batch, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig

from checkpoints import pixels, write_checkpoint
from layouts import convert
from llava.constants import IMAGE_TOKEN_INDEX as IMG
from llava.model.builder import load_pretrained_model
from llava.model.generation import REFUSED
from visionzip import visionzip

ROWS = [[1, IMG, 13, 40, 41], [1, 50, IMG, 51, IMG, 52, 53, 54], [1, 60, 61]]
TOKENS, EOS = 10, 2
EAGER_TO_END = {"sequence_bias": [[[EOS], 100.0]]}

Settings = Callable[["Model"], dict[str, Any]]


class Model:
    """A model, and what it answers to each of the prompts alone."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.images = pixels(3)
        self.greedy = self.alone({})

    def ask(self, rows: list[list[int]], images: Tensor | None, settings: dict[str, Any]) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": EOS, **settings}
        return self.model.generate(ids, images=images, attention_mask=mask, **options).tolist()

    def alone(self, settings: dict[str, Any]) -> list[list[int]]:
        own = [self.images[:1], self.images[1:], None]
        return [self.ask([row], images, settings)[0] for row, images in zip(ROWS, own, strict=True)]

    def batch(self, settings: dict[str, Any]) -> list[list[int]]:
        return self.ask(ROWS, self.images, settings)

    def ended(self, answers: list[list[int]]) -> list[list[int]]:
        """Answers filled up with padding to the longest."""
        pad, longest = self.model.generation_config.pad_token_id, max(map(len, answers))
        return [answer + [pad] * (longest - len(answer)) for answer in answers]

    def word(self) -> str:
        """One that the model writes to the first prompt, not at the beginning."""
        words = [self.tokenizer.decode([token]).strip() for token in self.greedy[0][1:]]
        return next(word for word in words if word.isalnum())


@pytest.fixture(scope="module", params=["llama", "llama zipped", "qwen", "transformers", "transformers zipped"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Each kind of backbone; the weights of both layouts of LLaMA's are the same."""
    folder = tmp_path_factory.mktemp("settings")
    kind, _, zipped = request.param.partition(" ")
    model_type = "llava_qwen" if kind == "qwen" else "llava_llama"
    path = write_checkpoint(folder / "llava-tiny", model_type=model_type)
    if kind == "transformers":
        assert convert(path, folder / "llava-1.5-tiny-hf", "transformers") == 0
        path = folder / "llava-1.5-tiny-hf"
    tokenizer, loaded, _, _ = load_pretrained_model(str(path), device="cpu")
    return Model(tokenizer, visionzip(loaded, dominant=5, contextual=2) if zipped else loaded)


HONOURED: dict[str, Settings] = {
    "repetition_penalty": lambda m: {"repetition_penalty": 0.1},
    "repetition_penalty of beams": lambda m: {"repetition_penalty": 0.1, "num_beams": 3},
    "no_repeat_ngram_size": lambda m: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda m: {"bad_words_ids": [[row[0]] for row in m.greedy] + [m.greedy[0][1:3]]},
    "sequence_bias": lambda m: {"sequence_bias": [[[m.greedy[0][0]], -100.0], [m.greedy[1][:2], -100.0]]},
    "suppress_tokens": lambda m: {"suppress_tokens": [row[1] for row in m.greedy]},
    "begin_suppress_tokens": lambda m: {"begin_suppress_tokens": [row[0] for row in m.greedy]},
    "min_new_tokens": lambda m: {"min_new_tokens": 4, **EAGER_TO_END},
    "min_length of every prompt": lambda m: {"min_length": 2, **EAGER_TO_END},
    "max_length": lambda m: {"max_length": 45, "max_new_tokens": None},
    "max_new_tokens": lambda m: {"max_new_tokens": 3},
    "forced_eos_token_id": lambda m: {"forced_eos_token_id": 7},
    "exponential_decay_length_penalty": lambda m: {"exponential_decay_length_penalty": (2, 5.0)},
    "watermarking_config": lambda m: {"watermarking_config": WatermarkingConfig(bias=20.0, context_width=2)},
    "watermarking_config of SynthID": lambda m: {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    },
    "stop_strings": lambda m: {"stop_strings": [m.word()], "tokenizer": m.tokenizer},
    "prefix_allowed_tokens_fn": lambda m: {"prefix_allowed_tokens_fn": lambda row, ids: [9 + len(ids), 100]},
    "logits_processor": lambda m: {"logits_processor": [lambda ids, scores: scores.roll(ids.shape[1] + 1, 1)]},
    "num_beams": lambda m: {"num_beams": 3, "length_penalty": 2.0},
    "guidance_scale": lambda m: {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[1, 5, 6]])},
}
"""Each changes what the model answers."""


@pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers: penalties do not see the prompt
@pytest.mark.parametrize("name", HONOURED)
def test_a_row_of_a_batch_answers_as_it_would_alone(name: str, model: Model, monkeypatch: pytest.MonkeyPatch):
    settings = HONOURED[name](model)
    alone = model.alone(settings)
    assert alone != model.greedy
    if "negative_prompt_ids" in settings:
        settings["negative_prompt_ids"] = settings["negative_prompt_ids"].expand(len(ROWS), -1)
    assert model.batch(settings) == model.ended(alone)
    of_config = {name: value for name, value in settings.items() if name in vars(GenerationConfig()) and value}
    for setting, value in of_config.items():
        monkeypatch.setattr(model.model.generation_config, setting, value)
    rest = {name: value for name, value in settings.items() if name not in of_config}
    if "max_new_tokens" in of_config:
        rest["max_new_tokens"] = of_config["max_new_tokens"]  # the tests' own default is an argument
    assert model.batch(rest) == model.ended(alone)


NOT_FOR_EMBEDDINGS: dict[str, Any] = {
    "assistant_early_exit": 1,
    "use_mtp": True,
    "encoder_repetition_penalty": 2.0,
    "encoder_no_repeat_ngram_size": 2,
    "forced_bos_token_id": 5,
    "guidance_scale": 2.0,
    "prefill_chunk_size": 4,
    "cache_implementation": "paged",
    "token_healing": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_embeddings_do_not_allow_is_refused(name: str, model: Model, monkeypatch: pytest.MonkeyPatch):
    """Before an image is encoded, in either place; a value that switches it off is none."""
    monkeypatch.setattr(type(model.model), "visual_tokens", None)
    value = NOT_FOR_EMBEDDINGS.get(name, model.model)  # of assistant_model
    with pytest.raises(ValueError, match=rf"^{name}=\S+ cannot be used here: .*leave it out$"):
        model.batch({name: value})
    if name != "assistant_model":
        monkeypatch.setattr(model.model.generation_config, name, value)
        with pytest.raises(ValueError, match=f"^{name}="):
            model.batch({})
        assert model.ask(ROWS[2:], None, {name: None}) == model.greedy[2:]
        for neutral in REFUSED[name].neutral:
            assert model.ask(ROWS[2:], None, {name: neutral}) == model.greedy[2:]


def test_drafts_from_the_answer_so_far(model: Model):
    """But not behind a cache of earlier turns, where the prompt would be fed again. It is for one row at a time."""
    drafts = {"prompt_lookup_num_tokens": 3}
    assert model.alone(drafts) == model.greedy
    empty = {**drafts, "past_key_values": DynamicCache()}
    assert model.ask(ROWS[:1], model.images[:1], empty) == model.greedy[:1]
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.batch(drafts)
    cache = DynamicCache()
    model.ask(ROWS[:1], model.images[:1], {"past_key_values": cache})
    with pytest.raises(ValueError, match=r"^prompt_lookup_num_tokens does not go with past_key_values of .*Leave"):
        model.ask([[*ROWS[0], 9, 9]], model.images[:1], {**drafts, "past_key_values": cache})


def test_padding_is_found_by_the_id_that_a_call_names(model: Model):
    """Not where it also ends answers: then it may be text."""
    rows = torch.tensor([[5, 5, *ROWS[2]], [1, 70, 71, 72, 73]])
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    found = model.model.generate(rows, pad_token_id=5, **options)
    assert torch.equal(found[:1], model.model.generate(rows[:1, 2:], **options))
    text = model.model.generate(rows, pad_token_id=5, eos_token_id=[4, 5], **options)
    assert torch.equal(text[:1], model.model.generate(rows[:1], **options))


def test_lengths_that_cannot_be_those_of_each_row_are_refused(model: Model):
    """And those that no answer fits in."""
    for settings, message in (
        ({"min_length": 40}, r"min_length=40 counts the prompts, which have 3 to \d+ tokens here, .*min_new_tokens"),
        ({"max_length": 45, "num_beams": 2}, "max_length=45 counts .* so that num_beams would .*max_new_tokens"),
        ({"max_length": 45, "forced_eos_token_id": 7}, "so that forced_eos_token_id would end rows too early"),
        ({"max_length": 10}, r"max_length=10 counts the prompt, and prompt 1 has \d\d tokens with its images: give"),
    ):
        with pytest.raises(ValueError, match=message):
            model.batch({"max_new_tokens": None, **settings})
    with pytest.raises(ValueError, match="max_length=1 counts the prompt, and prompt 0 has 2 tokens"):
        model.model.generate(torch.tensor([[1, 5]]), generation_config=GenerationConfig(max_length=1))

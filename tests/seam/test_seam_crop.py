"""A KV cache that was cropped, and what may follow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from seam_models import FAMILIES, Part, Picture, batch
from test_seam_families import GREEDY, answers

from visionzip import visionzip

ROWS: list[list[Part]] = [["ab", Picture(1), "cde"], ["xy", Picture(2), "cde"]]
BEHIND = 4 + 3 + 1  # tokens behind the image: those of the answer that are in the cache, "cde", and the image's end


def answered(name: str, rows: list[list[Part]], **setting: Any) -> tuple[Any, Any, Any]:
    """A model that keeps 4 of an image's 16 tokens, its inputs, and its answer with the cache."""
    model = visionzip(FAMILIES[name].build(), keep=4, method="norm", **setting)
    inputs = batch(FAMILIES[name], rows)
    return model, inputs, model.generate(**inputs, **GREEDY, return_dict_in_generate=True)


def cropped(turn: Any, tokens: int) -> Any:
    cache = copy.deepcopy(turn.past_key_values)
    cache.crop(-tokens)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "alone"])
def test_a_whole_conversation_on_a_cropped_cache(name: str, rows: list[list[Part]]):
    """Cropped in the text behind an image, right behind the image, or in front of it; inside of it is refused."""
    model, inputs, turn = answered(name, rows)
    for tokens in (BEHIND - 2, BEHIND, BEHIND + 4):
        given = {**inputs, "past_key_values": cropped(turn, tokens)}
        assert torch.equal(answers(model, given), turn.sequences[:, -5:]), tokens
    with pytest.raises(ValueError, match=r"ends inside image 0: it was cut there, .* Crop it in front of"):
        answers(model, {**inputs, "past_key_values": cropped(turn, BEHIND + 2)})


@torch.no_grad()
@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
def test_text_behind_a_part_of_an_image(name: str):
    """It stands behind what is left of the image, not among it."""
    model, _, turn = answered(name, ROWS[:1], **{} if name == "qwen3_vl" else {"positions": "original"})
    seen: list[dict[str, Any]] = []
    model.model.language_model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(**batch(FAMILIES[name], ROWS[:1]))
    first = seen[0]["position_ids"]
    cache = cropped(turn, BEHIND + 1)
    left = first[..., : cache.get_seq_length()]
    mask = torch.ones(1, cache.get_seq_length() + 3, dtype=torch.long)
    model.generate(input_ids=torch.tensor([[30, 31, 32]]), attention_mask=mask, past_key_values=cache, **GREEDY)
    assert seen[1]["position_ids"].reshape(-1, 3)[-1].tolist() == [int(left.max()) + more for more in (1, 2, 3)]

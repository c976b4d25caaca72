"""What a zipped model of transformers costs beside its own work: a step of decoding, and the prompts."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, IMAGES

from visionzip import visionzip

K, M = 4, 2


def our_calls(run: Any) -> list[str]:
    """Names of the Python functions of this package that run."""
    names: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "/visionzip/" in frame.f_code.co_filename.replace("\\", "/"):
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_of_decoding_costs_three_calls(family: str):
    """At most: one check of the model, one of its base model. There were 28 when the base model's hook looked again."""
    make, processor = FAMILIES[family]
    model = visionzip(make(), K, M)
    inputs = processor()(images=IMAGES[:1], text="<image> one", return_tensors="pt")

    def answer(count: int) -> list[str]:
        return our_calls(lambda: model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False))

    answer(1)  # signatures are looked up once
    ten, five = answer(10), answer(5)
    assert len(ten) - len(five) <= 5 * 3, ten[len(five) :]
    output = model(**inputs)
    said = {"input_ids": torch.tensor([[9]]), "past_key_values": output.past_key_values}
    assert len(our_calls(lambda: model(**said))) <= 3  # a loop of one's own


@pytest.mark.parametrize("positions", ["consecutive", "original"])
def test_prompts_are_looked_through_once(positions: str):
    """For their runs of placeholders; with original positions for what they end with, too."""
    make, processor = FAMILIES["llava"]
    model = visionzip(make(), K, M, positions=positions)
    inputs = processor()(images=IMAGES[:1], text="<image> one", return_tensors="pt")
    calls = our_calls(lambda: model.generate(**inputs, max_new_tokens=2))
    assert calls.count("find_runs") == calls.count("visuals") == 1

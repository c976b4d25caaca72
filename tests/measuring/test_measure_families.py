"""``visionzip benchmark families``: the same figures of a tiny model."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
from seam_models import FAMILIES

from llava.measure import families


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_every_way_sees_as_many_tokens_as_its_share_and_the_model_is_left_as_it_was(name: str):
    model = FAMILIES[name].build()
    args = argparse.Namespace(keep=[0.5, 0.25], image_size=64, text_tokens=6, rounds=2, device="cpu")
    rows: list[dict[str, Any]] = families.measure(model, args)
    assert {row["way"]: row["visual_tokens"] for row in rows} == {
        "whole": 64,
        "visionzip 0.5": 32,
        "resize 0.5": 30,  # 6 x 5, as square as it can be
        "visionzip 0.25": 16,
        "resize 0.25": 16,
    }
    for row in rows:
        assert set(row["seconds"]) == {"encode", "choose", "prefill", "first_token"}
        assert all(found["median"] > 0 for found in row["seconds"].values())
    assert rows[0]["first_token"]["median"] == rows[0]["of_bare"]["median"] == 1
    assert rows[0]["added"]["median"] == 0
    assert "_visionzip" not in vars(model)
    json.dumps(rows)

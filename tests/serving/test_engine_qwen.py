"""Qwen-VL in vLLM: the real server with the embedded Qwen3-VL, and tiny models inside the engine (engine_qwen.py).

Opt-in: ``bash scripts/serve_test.sh``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from served import END, ROOT, Server, ids_of, inside, needs_engine, scenes, serve
from tiny_served import write_qwen

from llava.model.stock.processor_model import inputs_of, load_model, load_processor, prompt_of, user_turn
from visionzip import visionzip

MODEL = str(ROOT / "checkpoints/qwen-mini")
SETTINGS = {"vanilla": (None, 36), "18": ({"keep": 0.5}, 18), "9": ({"keep": 0.25, "method": "scope"}, 9)}
pytestmark = needs_engine


@pytest.fixture(scope="module", params=list(SETTINGS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve("qwen-mini", *SETTINGS[request.param], tmp_path_factory.mktemp("server") / "log") as made:
        yield made


def ours(rows: Sequence[dict[str, Any]], setting: dict[str, Any] | None) -> list[tuple[list[int], int]]:
    """Tokens of the project's own greedy answers, and the length of each uncompressed prompt."""
    processor = load_processor(MODEL)
    model = load_model(MODEL, processor, "cpu", torch.float32)
    if setting:
        visionzip(model, **setting)
    found = []
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        inputs = inputs_of(processor, [prompt_of(processor, [user_turn(row["question"], 1)])], [[image]])
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:].tolist()
        found.append(([token for token in out if token != END], length))
    return found


def test_answers_equal_ours(server: Server):
    """Token for token; a prompt is as much shorter as its image has fewer tokens."""
    rows = scenes()
    with ThreadPoolExecutor(8) as pool:  # many requests, of different lengths, in each step of the engine
        replies = list(pool.map(lambda row: server.ask(row["question"], [row["image"]["bytes"]]), rows))
    expected = ours(rows, server.setting)
    pairs = zip(replies, expected, strict=True)
    assert not {at: (ids_of(reply), own) for at, (reply, (own, _)) in enumerate(pairs) if ids_of(reply) != own}
    lengths = [full - 36 + server.tokens for _, full in expected]
    assert [reply["usage"]["prompt_tokens"] for reply in replies] == lengths


def test_two_images_and_none(server: Server):
    pictures = list({row["image_id"]: row["image"]["bytes"] for row in scenes()}.values())
    replies = [server.ask("What color is the circle?", pictures[:count]) for count in range(3)]
    none, one, two = (reply["usage"]["prompt_tokens"] for reply in replies)
    assert two - one == one - none == server.tokens + 2  # with the tokens before and behind each image
    assert all(ids_of(reply) for reply in replies)


FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["whole", "cut"])
def test_answers_and_visual_tokens_are_those_of_transformers(kind: str, family: str, tmp_path: Path):
    """Whole prompts with all methods; and prompts cut in the middle of images, with the prefix cache."""
    found = inside("engine_qwen.py", kind, write_qwen(tmp_path / "tiny", family))
    assert len(found) == {"whole": 36, "cut": 27}[kind] and not [each for each in found if not each["right"]]

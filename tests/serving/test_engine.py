"""The real server with the embedded LLaVA, as ``scripts/serve.sh`` starts it: its answers, counts, caches and errors.

Opt-in, as its environment has 3.5 GB: ``bash scripts/serve_test.sh`` makes it and runs these tests.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from served import END, ROOT, Server, ids_of, needs_engine, scenes, serve

from checkpoints import picture
from eval.models.llava import prompt_of
from eval.records import Question, Visual
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from visionzip import visionzip

MODEL = ROOT / "checkpoints/llava-mini"
SETTINGS = {
    "vanilla": (None, 144),
    "32": ({"dominant": 27, "contextual": 5}, 32),
    "16": ({"dominant": 13, "contextual": 3}, 16),
}
pytestmark = needs_engine


@pytest.fixture(scope="module", params=list(SETTINGS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve("llava-mini", *SETTINGS[request.param], tmp_path_factory.mktemp("server") / "log") as made:
        yield made


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return scenes()


@pytest.fixture(scope="module")
def pictures(questions: list[dict[str, Any]]) -> list[bytes]:
    """Their files, all different."""
    return list({row["image_id"]: row["image"]["bytes"] for row in questions}.values())


def ours(rows: Sequence[dict[str, Any]], setting: dict[str, Any] | None) -> list[tuple[list[int], int]]:
    """Tokens of the project's own greedy answers, and the length of the text in each prompt."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(MODEL), device="cpu")
    if setting:
        visionzip(model, **setting)
    found = []
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        prompt = prompt_of(Question(0, row["question"], (Visual("", list),)), model.config, "vicuna_v1")
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        pixels = process_images([image], image_processor, model.config).to(model.dtype)
        with torch.inference_mode():
            out = model.generate(ids[None], images=pixels, max_new_tokens=8, do_sample=False)[0].tolist()
        found.append(([token for token in out if token != END], len(ids) - 1))
    return found


def test_answers_equal_ours(server: Server, questions: list[dict[str, Any]]):
    """Token for token; prompt tokens are those of the text and of the image's kept tokens."""
    replies = [server.ask(row["question"], [row["image"]["bytes"]]) for row in questions]
    expected = ours(questions, server.setting)
    different = {
        index: (ids_of(reply), own)
        for index, (reply, (own, _)) in enumerate(zip(replies, expected, strict=True))
        if ids_of(reply) != own
    }
    assert not different
    lengths = [text + server.tokens for _, text in expected]
    assert [reply["usage"]["prompt_tokens"] for reply in replies] == lengths


def test_two_images_and_none(server: Server, pictures: list[bytes]):
    replies = [server.ask("What color is the circle?", pictures[:count]) for count in range(4)]
    none, one, two, three = (reply["usage"]["prompt_tokens"] for reply in replies)
    newline = 2  # behind each image, in this tokenizer
    assert three - two == two - one == server.tokens + newline
    assert none < one - server.tokens < none + 4
    assert all(ids_of(reply) for reply in replies)


def test_three_turns_on_one_image_prepare_it_once(server: Server):
    """vLLM knows an image by the hash of its pixels and the setting; engine_inside.py counts encoder runs."""
    file = io.BytesIO()
    picture(7, (144, 144)).save(file, "PNG")
    before, turns = server.count("vllm:mm_cache_hits_total"), []
    encoded = server.count("vllm:mm_cache_queries_total")
    lengths = []
    for question in ("What color is the circle?", "How many shapes are there?", "What is the background?"):
        turns += [question]
        reply = server.ask(turns[0], [file.getvalue()], turns[1:])
        turns += [reply["choices"][0]["message"]["content"]]
        lengths.append(reply["usage"]["prompt_tokens"])
    assert server.count("vllm:mm_cache_queries_total") - encoded == 3
    assert server.count("vllm:mm_cache_hits_total") - before == 2
    assert lengths == sorted(set(lengths))


def test_requests_at_once_are_neither_lost_nor_mixed_up(server: Server, pictures: list[bytes]):
    """16 clients, with and without images; each gets what it gets when it is alone."""
    asked = [("What color is the circle?", [picture]) for picture in pictures[:24]]
    asked += [("What is the background?", [picture]) for picture in pictures[:16]]
    asked += [(f"What is {number} and one?", []) for number in ("one", "two", "three", "four", "five", "six")] * 4
    asked = asked[::2] + asked[1::2]
    alone = [ids_of(server.ask(*each)) for each in asked]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda each: ids_of(server.ask(*each)), asked))
    assert together == alone


def test_a_broken_image_is_the_clients_fault(server: Server, pictures: list[bytes]):
    """It gets a 4xx, and so does a path to a file of the server; the others are served on."""
    for url in ("data:image/jpeg;base64,bm90IGFuIGltYWdl", f"file://{ROOT}/examples/scene.jpg"):
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.ask("", messages=[{"role": "user", "content": content}])
        assert 400 <= refused.value.code < 500
    assert ids_of(server.ask("What color is the circle?", pictures[:1]))


def test_a_client_that_dies_disturbs_nobody(server: Server, pictures: list[bytes]):
    """``kill -9`` in the middle of its answers."""
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests/serving', 'tests/support']\n"
        "from served import Server\n"
        f"server = Server({server.url!r}, 'llava-mini', None, 0)\n"
        "picture = Path('examples/scene.jpg').read_bytes()\n"
        "while True: server.ask('Tell me all.', [picture], max_tokens=400, ignore_eos=True); print('!', flush=True)"
    )
    client = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for _ in range(200):
        if server.count("vllm:num_requests_running") >= 1:
            break
        time.sleep(0.1)
    client.kill()
    assert client.wait(30) == -signal.SIGKILL
    expected = ids_of(server.ask("What color is the circle?", pictures[:1]))
    for _ in range(100):
        if server.count("vllm:num_requests_running") == 0:
            break
        time.sleep(0.1)
    assert server.count("vllm:num_requests_running") == 0
    assert ids_of(server.ask("What color is the circle?", pictures[:1])) == expected

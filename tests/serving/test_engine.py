"""The real server with the embedded model, as ``scripts/serve.sh`` starts it: its answers, counts, caches and errors.

Opt-in, as its environment has 3.5 GB: ``bash scripts/serve_test.sh`` makes it and runs these tests.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, build, text_config
from PIL import Image
from pyarrow import parquet

from checkpoints import picture
from eval.models.llava import prompt_of
from eval.records import Question, Visual
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from visionzip import visionzip

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "checkpoints/llava-mini"
QUESTIONS, END = 200, 2
SETTINGS = {"vanilla": (None, 144), "32": ((27, 5), 32), "16": ((13, 3), 16)}
pytestmark = pytest.mark.skipif(
    not os.environ.get("SERVE_ENV"),
    reason="starts vLLM: bash scripts/serve_test.sh makes its environment and runs this",
)


@dataclass(frozen=True)
class Server:
    """One that answers: where it is, how it was zipped, and image tokens of each picture."""

    url: str
    budget: tuple[int, int] | None
    tokens: int

    def ask(self, text: str, images: Sequence[bytes] = (), turns: Sequence[str] = (), **values: Any) -> dict[str, Any]:
        """A greedy answer; ``turns`` are the answer and the question of each turn behind the first."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"}}
            for image in images
        ]
        messages: list[Any] = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        messages += [
            {"role": ("assistant", "user")[i % 2], "content": [{"type": "text", "text": turn}]}
            for i, turn in enumerate(turns)
        ]
        body = {
            "model": "llava-mini",
            "messages": messages,
            "max_tokens": 8,
            "temperature": 0,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body | values).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    def count(self, name: str) -> float:
        """A counter of vLLM's, such as ``vllm:mm_cache_hits_total``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def ids_of(reply: dict[str, Any]) -> list[int]:
    """The answer's tokens, without the one that ends it."""
    return [token for token in reply["choices"][0]["token_ids"] if token != END]


@pytest.fixture(scope="module", params=list(SETTINGS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    budget, tokens = SETTINGS[request.param]
    setting = json.dumps(budget and {"dominant": budget[0], "contextual": budget[1]})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", ROOT / "scripts/serve.sh", "--max-model-len", "1024"],
            env={**os.environ, "SETTING": setting, "PORT": str(port), "MODEL_PATH": str(MODEL)},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        made = Server(f"http://127.0.0.1:{port}", budget, tokens)
        wait_for(made, process, log)
        yield made
        assert process.poll() is None, log.read_text()[-2000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def wait_for(server: Server, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """The first of the scenes test set."""
    return parquet.read_table(ROOT / "playground/data/eval/scenes/test.parquet").to_pylist()[:QUESTIONS]


@pytest.fixture(scope="module")
def pictures(questions: list[dict[str, Any]]) -> list[bytes]:
    """Their files, all different."""
    return list({row["image_id"]: row["image"]["bytes"] for row in questions}.values())


def ours(rows: Sequence[dict[str, Any]], budget: tuple[int, int] | None) -> list[tuple[list[int], int]]:
    """Tokens of the project's own greedy answers, and the length of the text in each prompt."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(MODEL), device="cpu")
    if budget:
        visionzip(model, *budget)
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
    expected = ours(questions, server.budget)
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
        "from test_engine import Server\n"
        f"server = Server({server.url!r}, None, 0)\n"
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


# --- inside the engine ---


def write_tiny(folder: Path, family: str, siglip: bool) -> Path:
    """A zipped checkpoint of random weights, with heads as large as vLLM's kernels for CPUs need."""
    make, make_processor = FAMILIES[family]
    text = text_config(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    encoder = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"} if siglip else {}
    config = make(siglip).config
    config.text_config = text
    visionzip(build(type(make(siglip)), config), 4, 2).save_pretrained(folder)
    make_processor(**encoder).save_pretrained(folder)
    return folder


def inside(kind: str, path: Path) -> list[dict[str, Any]]:
    """Findings of tests/serving/engine_inside.py."""
    done = subprocess.run(
        [Path(os.environ["SERVE_ENV"]) / "bin/python", ROOT / "tests/serving/engine_inside.py", kind, path],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"')]


@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_visual_tokens_of_all_methods_are_those_of_transformers(family: str, siglip: bool, tmp_path: Path):
    """Of images of different shapes, tile by tile, whether the encoder sees them all at once or two at a time."""
    found = inside("compare", write_tiny(tmp_path / "tiny", family, siglip))
    assert len(found) > 2 * 10 and not [each for each in found if not each["right"]]


def test_an_image_is_encoded_once_in_three_turns(tmp_path: Path):
    (found,) = inside("count", write_tiny(tmp_path / "tiny", "llava", False))
    assert found["right"], found

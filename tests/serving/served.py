"""The real server of an embedded model, as ``scripts/serve.sh`` starts it, and what asks it."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from llava.measure.meters.engine import read_metric

ROOT = Path(__file__).parents[2]
QUESTIONS, END = 200, 2
needs_engine = pytest.mark.skipif(
    not os.environ.get("SERVE_ENV"),
    reason="starts vLLM: bash scripts/serve_test.sh makes its environment and runs this",
)


@dataclass(frozen=True)
class Server:
    """One that answers: where it is, which model it has, how it was zipped, and image tokens of each picture."""

    url: str
    model: str
    setting: dict[str, Any] | None
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
            "model": self.model,
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
            return sum(read_metric(reply.read().decode(), name))


def ids_of(reply: dict[str, Any]) -> list[int]:
    """The answer's tokens, without the one that ends it."""
    return [token for token in reply["choices"][0]["token_ids"] if token != END]


@contextmanager
def serve(name: str, setting: dict[str, Any] | None, tokens: int, log: Path) -> Iterator[Server]:
    """Serve one of the embedded models while the block runs; ``setting`` is that of ``scripts/serve.sh``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", ROOT / "scripts/serve.sh", "--max-model-len", "1024"],
            env={
                **os.environ,
                "SETTING": json.dumps(setting),
                "PORT": str(port),
                "MODEL_PATH": str(ROOT / "checkpoints" / name),
            },
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        made = Server(f"http://127.0.0.1:{port}", name, setting, tokens)
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


def scenes() -> list[dict[str, Any]]:
    """The first of the scenes test set."""
    return parquet.read_table(ROOT / "playground/data/eval/scenes/test.parquet").to_pylist()[:QUESTIONS]


def inside(script: str, *words: str | Path) -> list[dict[str, Any]]:
    """Findings of a script in this folder that runs with the engine's own Python."""
    done = subprocess.run(
        [Path(os.environ["SERVE_ENV"]) / "bin/python", ROOT / "tests/serving" / script, *words],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"')]

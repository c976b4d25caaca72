"""The page's server: what it answers and refuses, and twenty visitors at once.

The visitors stay for ten seconds, or for as many as VISIONZIP_DEMO_SECONDS says.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")

import httpx
import pyarrow.parquet as pq
from gradio_client import Client
from PIL import Image
from served_page import CONTROLS, MODEL, ROOT, Served, answers, sent, served_page

from llava.commands.loading import load_from_arguments
from llava.demo.examples import EXAMPLES
from llava.demo.guard import MAX_BODY
from llava.serve.chat import ChatSession
from visionzip import unzip, visionzip

RING, LETTERS = EXAMPLES[0], EXAMPLES[1]
VISITORS = 20
SECONDS = float(os.environ.get("VISIONZIP_DEMO_SECONDS", "10"))
GROWTH = 50  # megabytes that the server may grow from its 50th conversation on: its allocator varies by 40


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_page(tmp_path_factory.mktemp("page")) as served:
        yield served


def visitor(page: Served) -> Client:
    return Client(page.address, verbose=False, analytics_enabled=False)


def test_two_visitors_have_their_own_conversations(page: Served):
    one, other = visitor(page), visitor(page)
    drawn = one.predict(sent(("ring.jpg", RING.upload().data)), *CONTROLS, api_name="/add_images")[1]
    assert json.loads(drawn)["data"]["tokens"] == [145, 32]
    assert answers(one.predict(RING.question, *CONTROLS, api_name="/ask")[0]) == [("yellow", "yellow")]
    other.predict(sent(("letters.jpg", LETTERS.upload().data)), *CONTROLS, api_name="/add_images")
    assert answers(other.predict(LETTERS.question, *CONTROLS, api_name="/ask")[0]) == [("K", "K")]
    shown = one.predict("Which shape is white?", *CONTROLS, api_name="/ask")[0]
    assert [pair[0] for pair in answers(shown)] == ["yellow", "square"]
    error = one.predict(sent(("a.png", b"broken")), *CONTROLS, api_name="/add_images")[2]
    assert 'role="alert"' in error and "a.png is not a readable image" in error


def test_what_the_server_refuses(page: Served):
    """Files and addresses in the place of images, uploads to disk, bodies beyond the limit; it listens here alone."""
    fetched: list[str] = []

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Trap) as trap:
        threading.Thread(target=trap.serve_forever, daemon=True).start()
        client = httpx.Client(base_url=page.address + "/gradio_api", timeout=30)
        for path in (f"http://127.0.0.1:{trap.server_port}/x", str(MODEL / "config.json")):
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
            told = {"data": data, "fn_index": 0, "session_hash": "abc"}
            assert client.post("/queue/join", json=told).status_code == 400
        trap.shutdown()
    assert client.post("/upload", files={"files": ("a.png", b"x")}).status_code == 403
    assert client.post("/queue/join", content=bytes(MAX_BODY + 1)).status_code == 413
    assert client.post("/queue/join", content=iter([bytes(2**20)] * 40)).status_code == 413
    assert client.get(f"/file={MODEL / 'config.json'}").status_code == 403
    assert not fetched
    assert listening_addresses(page.pid) == {"0100007F"}  # 127.0.0.1
    assert not [path for path in page.temporary.rglob("*") if path.is_file()]


def listening_addresses(pid: int) -> set[str]:
    """Hexadecimal IPv4 addresses that a process listens on."""
    sockets = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def scenes() -> list[tuple[bytes, str, tuple[str, str]]]:
    """An image for each visitor, a question, and what both sides answer to it where nobody else is."""
    rows = pq.read_table(ROOT / "playground/data/eval/scenes/test.parquet").to_pylist()
    rows = {row["image_id"]: row for row in reversed(rows)}
    given = {"model_path": str(MODEL), "model_base": None, "conv_mode": None, "device": "cpu"}
    tokenizer, model, processor, conv_mode = load_from_arguments(type("Args", (), given))
    found = []
    for row in list(rows.values())[:VISITORS]:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        pair = []
        for zip_it in (unzip, lambda model: visionzip(model, keep=32)):
            session = ChatSession(zip_it(model), tokenizer, processor, conv_mode)
            pair.append(session.ask(row["question"], [image]).text)
        found.append((row["image"]["bytes"], row["question"], tuple(pair)))
    return found


def test_twenty_visitors_at_once(page: Served, capsys: pytest.CaptureFixture):
    """None is lost, none gets another's answer, and memory stays flat."""
    visits, memory, waits = scenes(), [], []
    assert len({answer for _, _, (answer, _) in visits}) > 8  # a mix-up would show
    start = threading.Barrier(VISITORS)

    def stay(number: int) -> int:
        image, question, expected = visits[number]
        client = visitor(page)
        start.wait(120)
        asked, end = 0, time.monotonic() + SECONDS
        while asked == 0 or time.monotonic() < end:
            begun = time.monotonic()
            client.predict(api_name="/forget")
            drawn = client.predict(sent((f"{number}.jpg", image)), *CONTROLS, api_name="/add_images")[1]
            assert [each["name"] for each in json.loads(drawn)["images"]] == [f"{number}.jpg"]
            assert answers(client.predict(question, *CONTROLS, api_name="/ask")[0]) == [expected]
            asked += 1
            waits.append(time.monotonic() - begun)
            memory.append(page.megabytes())
        return asked

    with ThreadPoolExecutor(VISITORS) as pool:
        asked = list(pool.map(stay, range(VISITORS)))
    settled = memory[min(50, len(memory) // 2)]
    tenths = " ".join(f"{memory[len(memory) * tenth // 10]:.0f}" for tenth in range(10)) + f" {memory[-1]:.0f}"
    with capsys.disabled():
        print(
            f"\n{VISITORS} visitors, {SECONDS:g} s: {sum(asked)} conversations ({min(asked)} to {max(asked)} each), "
            f"longest {max(waits):.1f} s; "
            f"server, MB, from the first to the last tenth: {tenths}"
        )
    assert memory[-1] - settled < GROWTH

"""The page as its users have it: ``visionzip demo`` in a process of its own, on the embedded model."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "checkpoints/llava-mini"
OWN = "the method's own"
CONTROLS = ("visionzip", "tokens", 32, OWN, OWN)


@dataclass(frozen=True)
class Served:
    """A page that answers.

    Attributes:
        address: http://127.0.0.1:…
        pid: the server's process.
        temporary: its folder for temporary files.
    """

    address: str
    pid: int
    temporary: Path

    def megabytes(self) -> float:
        """Memory that it has resident."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@contextmanager
def served_page(folder: Path, *flags: str) -> Iterator[Served]:
    """Start ``visionzip demo``, wait until it answers, and end it."""
    address, log = f"http://127.0.0.1:{(port := free_port())}", folder / "page.log"
    command = [sys.executable, "-m", "llava.cli", "demo", "--model-path", str(MODEL), "--port", str(port)]
    (folder / "temporary").mkdir()
    own = {"TMPDIR": str(folder / "temporary"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--temperature", "0", *flags],
            cwd=ROOT,
            env=os.environ | own,
            stdout=out,
            stderr=out,
        )
        try:
            _wait(address, server, log)
            yield Served(address, server.pid, folder / "temporary")
        finally:
            server.terminate()
            server.wait(30)


def _wait(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 240  # a busy machine imports for a while
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no page after 240 s: {log.read_text()}")


def sent(*files: tuple[str, bytes]) -> str:
    """Images as the page's JavaScript sends them."""
    return json.dumps(
        [{"name": name, "data": "data:image/png;base64," + base64.b64encode(data).decode()} for name, data in files]
    )


def answers(conversation: str) -> list[tuple[str, str]]:
    """Vanilla and zipped answer of each turn that the page shows."""
    found = re.findall(r'<p class="vz-answer">(.*?)</p>', conversation)
    return list(zip(found[::2], found[1::2], strict=True))

"""A judge for the tests: an endpoint on this machine, which answers as it is told."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from eval.scoring.replies import Request

Reply = str | tuple[int, dict[str, str], bytes]


class JudgeServer:
    """An OpenAI-compatible endpoint on this machine.

    Attributes:
        asked: the bodies of the requests, in the order in which they came.
        most: requests that were under way together, at most.
    """

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        """``reply``: of a request's body and how many there were before; a text, or status, headers and body."""
        self.asked: list[dict[str, Any]] = []
        self.authorization: set[str | None] = set()
        self.most = 0
        self._under_way = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.asked)
                    outer.asked.append(body)
                    outer.authorization.add(self.headers["Authorization"])
                    outer._under_way += 1
                    outer.most = max(outer.most, outer._under_way)
                assert self.path == "/v1/chat/completions"
                answer = reply(body, number)
                status, headers, content = (200, {}, completion(answer)) if isinstance(answer, str) else answer
                with outer._lock:
                    outer._under_way -= 1
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client did not wait
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(content: str | None, model: str = "gpt-4-0613") -> bytes:
    """A response as the chat API gives it."""
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
    return json.dumps({**whole, "usage": usage}).encode()


def failure(status: int, message: str, **headers: str) -> Reply:
    """An error as the API gives it."""
    error = {"message": message, "type": "error", "param": None, "code": None}
    return (
        status,
        {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps({"error": error}).encode(),
    )


def ask_of(*words: str) -> list[Request]:
    """Requests whose only message is a word."""
    return [Request(({"role": "user", "content": word},)) for word in words]


def word_of(body: dict[str, Any]) -> str:
    """The word of such a request."""
    return body["messages"][-1]["content"]

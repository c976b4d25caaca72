"""An OpenAI-compatible chat endpoint on this machine that streams its answers word by word, for the tests."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """Answers each question in three words, of which the first comes after ``delay`` seconds.

    With ``has_metrics`` it says at ``/metrics`` what vLLM says of its KV cache: each request in it takes a tenth, and
    the prefix cache has a quarter of what is asked.

    Attributes:
        asked: the bodies of the requests, in the order in which they came.
        most: requests that were under way together, at most.
    """

    def __init__(self, delay: float, prompt_tokens: int, has_metrics: bool = False) -> None:
        self.asked: list[dict[str, Any]] = []
        self.most = self._under_way = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics" and has_metrics:
                    self._begin(200)
                    self.wfile.write(outer._metrics().encode())
                    return
                self._begin(200 if self.path == "/v1/models" else 404)
                self.wfile.write(b'{"data": [{"id": "tiny"}]}')

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked.append(body)
                    outer._under_way += 1
                    outer.most = max(outer.most, outer._under_way)
                time.sleep(delay)
                self._begin(200)
                for word in ("one", " two", " three"):
                    self._send({"choices": [{"delta": {"content": word}}]})
                self._send({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 3}})
                self.wfile.write(b"data: [DONE]\n\n")
                with outer._lock:
                    outer._under_way -= 1

            def _begin(self, status: int) -> None:
                self.send_response(status)
                self.end_headers()

            def _send(self, event: dict[str, Any]) -> None:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _metrics(self) -> str:
        asked, labels = 8 * len(self.asked), '{engine="0",model_name="tiny"}'
        return (
            f"# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{labels} {self._under_way / 10}\n"
            f"vllm:prefix_cache_queries_total{labels} {asked}.0\nvllm:prefix_cache_hits_total{labels} {asked / 4}\n"
        )

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

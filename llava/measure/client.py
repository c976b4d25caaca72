"""A client of any OpenAI-compatible chat endpoint that says when the first token came; needs nothing but Python."""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 300  # seconds without a byte


@dataclass(frozen=True)
class Reply:
    """A streamed answer.

    Attributes:
        text: all of it.
        first: seconds to the first token.
        seconds: to the last.
        prompt_tokens: as the server counts them.
        new_tokens: of the answer.
    """

    text: str
    first: float
    seconds: float
    prompt_tokens: int
    new_tokens: int


class Endpoint:
    """An endpoint's address, such as ``http://127.0.0.1:8000/v1``, and the model that it serves.

    ``OPENAI_API_KEY`` is sent if it is set.

    Raises:
        ValueError: the address is none, or the server has no model of that name.
        OSError: nothing answers there.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no address of a server: give one such as http://127.0.0.1:8000/v1")
        self.url, self._parts = url.rstrip("/"), parts
        names = [entry["id"] for entry in json.loads(self._get("/models"))["data"]]
        if model is not None and model not in names:
            raise ValueError(f"{url} serves no model {model!r}: it has {', '.join(names)}")
        self.model = model or names[0]

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT)

    def _headers(self) -> dict[str, str]:
        key = os.environ.get("OPENAI_API_KEY")
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def metrics(self) -> str:
        """What the server says of itself at ``/metrics``, beside ``/v1``; empty where it has no such page."""
        try:
            return self._get("/metrics", self._parts.path.rstrip("/").removesuffix("/v1")).decode(errors="replace")
        except (OSError, ValueError, http.client.HTTPException):
            return ""

    def _get(self, path: str, root: str | None = None) -> bytes:
        connection = self._connect()
        try:
            base = urlsplit(self.url).path if root is None else root
            connection.request("GET", f"{base}{path}", headers=self._headers())
            return _checked(connection.getresponse(), self.url).read()
        except ConnectionError as error:
            raise OSError(f"nothing answers at {self.url} ({error}): start the server first") from error
        finally:
            connection.close()

    def ask(self, question: str, images: Sequence[bytes], tokens: int, extra: Mapping[str, Any]) -> Reply:
        """Ask one greedy question and stream the answer.

        Args:
            question: the text.
            images: JPEG files, before it.
            tokens: at most so many of the answer.
            extra: further fields of the request.

        Raises:
            ValueError: the server refuses, or ends without having counted the tokens.
            OSError: the connection fails.
        """
        urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **extra,
        }
        connection, start = self._connect(), time.perf_counter()
        try:
            path = f"{urlsplit(self.url).path}/chat/completions"
            connection.request("POST", path, json.dumps(body), self._headers())
            return self._read(_checked(connection.getresponse(), self.url), start)
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, start: float) -> Reply:
        text, first, usage = [], None, None
        for event in _events(response):
            if "error" in event:
                raise ValueError(f"{self.url} broke off: {event['error']}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter()
                    text.append(piece)
        end = time.perf_counter()
        if usage is None:
            raise ValueError(f"{self.url} counts no tokens of streamed answers (stream_options.include_usage)")
        return Reply(
            "".join(text), (first or end) - start, end - start, usage["prompt_tokens"], usage["completion_tokens"]
        )


def _checked(response: http.client.HTTPResponse, url: str) -> http.client.HTTPResponse:
    if response.status != 200:
        raise ValueError(f"{url} answers {response.status}: {response.read(500).decode(errors='replace')}")
    return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Events of a stream, until its end."""
    for line in response:
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield json.loads(data)

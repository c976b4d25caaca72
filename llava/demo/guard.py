"""Around the page's server: requests have a limit, and none can name a file or an address for the server to open."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.demo.uploads.images import MAX_TOTAL

MAX_BODY = MAX_TOTAL * 4 // 3 + 2**20  # base64, and room for the rest of a request


class Guard:
    """Refuses, before gradio sees them: bodies beyond :data:`MAX_BODY`, uploads to disk, and references to files.

    Gradio itself checks that a path lies among its uploads, but it fetches an address that stands in a path's place.
    The page's images come as text, so that nothing but texts and numbers is expected.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        body, refusal = b"", None
        if scope["path"].rstrip("/").endswith("/upload"):
            refusal = PlainTextResponse("files are not stored here: the page sends images as text", 403)
        else:
            body, refusal = await _read(receive)
        if refusal is None and names_file(body):
            refusal = PlainTextResponse("no file or address is opened for a visitor", 400)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


async def _read(receive: Receive) -> tuple[bytes, PlainTextResponse | None]:
    """A request's body, or why it is not read to its end."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return b"", PlainTextResponse(f"a request has at most {MAX_BODY >> 20} MB", 413)
        if not message.get("more_body", False):
            return b"".join(parts), None


def names_file(body: bytes) -> bool:
    """Whether a JSON body has an object with a path or an address in it, as gradio writes files; or may have it."""
    waiting: list[Any] = []
    try:
        waiting.append(json.loads(body))
    except RecursionError:  # nested deeper than it can be looked through
        return True
    except ValueError:
        pass
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.keys() & {"path", "url"}:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False

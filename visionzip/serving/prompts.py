"""For vLLM's ``--middleware``: chat prompts begin with ``<s>``, as those of transformers' processors do.

vLLM's chat leaves that to the chat template, and those of LLaVA checkpoints have none, as transformers' processors add
it: without it 4 of 200 answers of the embedded model differ. A ``<s>`` in the template is not the same to all
tokenizers (the blank before the next word is missing), so requests ask for it, unless they say ``add_special_tokens``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

_FIELD = b'{"add_special_tokens": true, '  # in front: of two fields of a name the last one holds
Application = Callable[[Any, Any, Any], Awaitable[None]]


class SpecialTokens:
    """An ASGI middleware that puts ``"add_special_tokens": true`` into chat requests.

    Args:
        app: what it stands before.
    """

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["path"].endswith("/chat/completions"):
            await self.app(_longer(scope), _receive_changed(receive), send)
        else:
            await self.app(scope, receive, send)


def _longer(scope: Any) -> Any:
    """The request's head, with the length that its body is going to have."""
    headers = [
        (name, str(int(value) + len(_FIELD) - 1).encode() if name == b"content-length" else value)
        for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}


def _receive_changed(receive: Any) -> Any:
    begun = False

    async def changed() -> Any:
        nonlocal begun
        message = await receive()
        if message["type"] == "http.request" and not begun and (body := message.get("body", b"")):
            begun = True
            if body[:1] == b"{":
                message = {**message, "body": _FIELD + body[1:]}
        return message

    return changed

"""Let chat prompts of vLLM begin with ``<s>``, as those of transformers' processors do; for ``--middleware``.

vLLM leaves ``<s>`` to the chat template. The templates of LLaVA checkpoints lack it, as transformers' processors add it
themselves. Without it, 4 of 200 answers of the embedded model differ. Some tokenizers treat a ``<s>`` in the template
differently (the blank before the next word is missing). So requests are changed to ask for it, unless they set
``add_special_tokens`` themselves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

_FIELD = b'{"add_special_tokens": true, '  # in front, as the last of two fields with one name counts
Application = Callable[[Any, Any, Any], Awaitable[None]]


class SpecialTokens:
    """An ASGI middleware that puts ``"add_special_tokens": true`` into chat requests.

    Args:
        app: the application that gets the requests.
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
    """Change the length in the request's head to that of the changed body."""
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

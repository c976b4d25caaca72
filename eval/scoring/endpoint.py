"""The line to an OpenAI-compatible endpoint: requests repeated while it is in trouble, and given up together."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

PATIENCE = 180.0  # seconds without any reply after which an endpoint counts as dead
_RETRIES = 8  # of one request; with the waits that is 40 s of a server that says at once that it cannot
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds, doubled from one repetition to the next
_LONGEST_ASKED_FOR = 60.0  # seconds that a server may ask to be left alone


class NoReplyError(Exception):
    """The endpoint gave no reply to a request, however often it was asked."""


class RefusedError(Exception):
    """The endpoint refuses a request, and repeating it would not help. The message says what would."""


class Line:
    """Requests to an endpoint that are under way together, in several threads.

    Each is repeated for a while. All are given up once there was no reply to any of them for the whole patience, so
    that an endpoint that is dead costs it once, and not once for every request.

    Args:
        client: of the package ``openai``, without retries of its own; its timeout is that of one try.
        patience: seconds; also the longest that one request may take, with its repetitions.
    """

    def __init__(self, client: Any, patience: float) -> None:
        self._client = client
        self._patience = patience
        self._heard = time.monotonic()
        self._trouble = "gives no reply"  # in words: what the endpoint did last
        self._closed = threading.Event()

    def ask(self, arguments: Mapping[str, Any]) -> dict[str, str | None]:
        """Ask until there is a reply.

        Args:
            arguments: of the chat API: ``model``, ``messages``, ``temperature`` and so on.

        Returns:
            ``reply`` and ``model``, who says that it gave it.

        Raises:
            NoReplyError: there is none.
            RefusedError: there will be none, whatever one waits.
        """
        import openai  # noqa: PLC0415 - slow to import, and an extra

        began = time.monotonic()
        for repetition in range(_RETRIES + 1):
            left = self._left(began)
            if left <= 0:
                break
            wait = None
            try:
                # The body as it is: the package would take anything for a reply.
                create = self._client.chat.completions.with_raw_response.create
                body = create(**arguments, timeout=min(self._client.timeout, left)).http_response.text
            except openai.APIStatusError as error:
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise RefusedError(self._refusal(error, str(arguments["model"]))) from error
                self._trouble = f"answers with {_status(error)}"
                wait = _asked_for(error.response.headers)
            except openai.APIConnectionError as error:
                reason = f"{error} {error.__cause__ or ''}".strip()
                self._trouble = f"cannot be reached ({reason})"
            else:
                found = _content(body)
                if found is not None:
                    self._heard = time.monotonic()
                    return found
                self._trouble = f"answers with what is no chat completion ({body[:200]!r})"
            if repetition < _RETRIES:
                wait = min(_FIRST_WAIT * 2**repetition, _LONGEST_WAIT) if wait is None else wait
                self._closed.wait(min(wait, max(0.0, self._left(began))))
        raise NoReplyError(f"{self._client.base_url} {self._trouble}")

    def close(self) -> None:
        """Give up: nothing is repeated any more."""
        self._closed.set()

    def _left(self, began: float) -> float:
        """Seconds for which a request that began at some time may go on."""
        return 0 if self._closed.is_set() else self._patience - (time.monotonic() - min(began, self._heard))

    def _refusal(self, error: Any, model: str) -> str:
        where, said = self._client.base_url, _status(error)
        if error.status_code in (401, 403):
            return f"{where} refuses the key ({said}): set OPENAI_API_KEY to one that may use {model}"
        if error.status_code == 404:
            return (
                f"{where} has no {model} ({said}): name another model with --judge, or set OPENAI_BASE_URL to an "
                "endpoint that has it"
            )
        return f"{where} refuses what it is asked ({said}): give a --judge that takes such requests"


def _asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to be left alone; None where it does not say, or says what no one would wait."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds <= _LONGEST_ASKED_FOR:
            return seconds
    return None


def _content(body: str) -> dict[str, str | None] | None:
    """The reply in a response's body, and the model that says it gave it; None if there is none.

    A message without content (a refusal) is an empty reply: the model has been asked and has been paid.
    """
    try:
        response = json.loads(body)
        content = response["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    if content is not None and not isinstance(content, str):
        return None
    return {"model": response.get("model"), "reply": content or ""}


def _status(error: Any) -> str:
    return f"HTTP {error.status_code}: {str(error.message)[:300]}"

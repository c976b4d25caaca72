"""A judge's replies: each is a file in the cache from the moment it comes; what cannot be read is asked for again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from llava.storage.files import write_atomically

from .endpoint import Line

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One thing to judge.

    Attributes:
        messages: as the chat API has them, with ``role`` and ``content``.
        temperature: that the protocol fixes; None is not sent.
        max_tokens: the same, for the reply's length.
    """

    messages: tuple[Mapping[str, str], ...]
    temperature: float | None = None
    max_tokens: int | None = None


class Replies(Generic[T]):
    """How the replies to some requests are had and read.

    Args:
        model: the judge's name.
        cache: folder of the replies, a file for each.
        attempts: how often it is asked about one answer at most.
        parse, retry, clear: see :meth:`eval.scoring.judge.Judge.ask`.

    Attributes:
        last: the file with the last reply that could not be read.
    """

    def __init__(
        self,
        model: str,
        cache: Path,
        attempts: int,
        parse: Callable[[str], T | None],
        retry: Callable[[Request, int], Request] | None,
        clear: Callable[[T], bool],
    ) -> None:
        self._model, self._cache, self._attempts = model, cache, attempts
        self._parse, self._retry, self._clear = parse, retry, clear
        self.last: Path | None = None

    def name(self, request: Request) -> str:
        """A checksum: equal requests have one name."""
        return _name(_record(self._model, request, 0))

    def last_words(self) -> str:
        """The beginning of the last reply that could not be read."""
        return str(_read(self.last))[:100]

    def _tries(self, request: Request) -> Iterator[dict[str, Any]]:
        """What is sent for a request: at first, and again. The attempt is a part of it: each has its own reply."""
        for attempt in range(self._attempts):
            again = attempt > 0 and self._retry is not None
            yield _record(self._model, self._retry(request, attempt) if again else request, attempt)

    def kept(self, request: Request) -> T | None:
        """The clear result of a request's reply in the cache; None where there is none.

        A cache may have replies that cannot be read: they were kept once. They do not count.
        """
        for record in self._tries(request):
            reply = _read(self._path(record))
            result = None if reply is None else self._parse(reply)
            if result is not None and self._clear(result):
                return result
        return None

    def ask(self, request: Request, line: Line) -> tuple[T | None, bool]:
        """Ask until there is a clear result, and put its reply into the cache; the result, and whether it is clear."""
        result = None
        for record in self._tries(request):
            reply = line.ask({key: value for key, value in record.items() if key != "attempt"})
            new = self._parse(reply["reply"])
            if new is not None and self._clear(new):
                _write(self._path(record), {"request": record, **reply})
                return new, True
            result = result if new is None else new
            path = self._path(record)
            self.last = path.parent / "unreadable" / path.name
            _write(self.last, {"request": record, **reply})
        return result, False

    def _path(self, record: Mapping[str, Any]) -> Path:
        return self._cache / f"{_name(record)}.json"


def _record(model: str, request: Request, attempt: int) -> dict[str, Any]:
    settings = {"temperature": request.temperature, "max_tokens": request.max_tokens}
    return {
        "model": model,
        "attempt": attempt,
        "messages": [dict(message) for message in request.messages],
        **{name: value for name, value in settings.items() if value is not None},
    }


def _name(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> str | None:
    try:
        reply = json.loads(path.read_bytes())["reply"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # there is none, or somebody damaged it: asked again
    return reply if isinstance(reply, str) else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    safe = "The replies that came before are kept: the same command goes on from there"
    write_atomically(path, json.dumps(content, indent=1), safe, shared=True)

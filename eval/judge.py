"""A language model as judge, behind any OpenAI-compatible endpoint; and the strings' comparison that stands in for it.

The endpoint and its key come from the environment: ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``, as the package
``openai`` reads them. Every reply is a file in the cache from the moment it comes, so that nothing is paid for twice
and a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from llava.files import write_atomically

T = TypeVar("T")

EXACT = "exact"
_RETRIES = 8  # of one reply, by the library: with its waits (0.5 s, doubled up to 8 s) that is 40 s of a server down
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds; the library's, for what it does not repeat: a reply that is none
_ARTICLES = {"a", "an", "the"}
_WORDS = re.compile(r"(?<!\w)-?\d+(?:\.\d+)*(?!\w)|[^\W_]+")


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


class _NoReplyError(Exception):
    """The server gave no reply to a request, however often it was asked."""


class Judge:
    """A language model that judges, or the proxy for one; made by :func:`api_judge` and :func:`exact_judge`.

    Attributes:
        model: its name, for the results; ``exact`` for the proxy.
        exact: there is no language model: benchmarks compare strings themselves, and label their score as a proxy.
    """

    def __init__(self, model: str, client: Any = None, cache: Path | None = None, workers: int = 1) -> None:
        self.model = model
        self.exact = client is None
        self._client = client
        self._cache = cache
        self._workers = workers

    def ask(
        self,
        requests: Sequence[Request],
        parse: Callable[[str], T | None],
        retry: Callable[[Request, int], Request] | None = None,
        attempts: int = 5,
    ) -> list[T | None]:
        """Judge; what is in the cache is not asked again. A bar on standard error shows how far it is.

        Args:
            requests: what to judge; equal ones are asked once.
            parse: makes the result of a reply; None where the reply has none: then it is asked again.
            retry: how it is asked again: the request as it was at first, and how often it has been asked (1, 2, …).
                None asks the same.
            attempts: how often one is asked at most.

        Returns:
            The results in the requests' order; None where no reply could be parsed.

        Raises:
            ValueError: the server refuses (key, model, request), or this judge is the proxy. The replies that there
                are stay in the cache.
            OSError: the server cannot be reached or gives no replies. The same.
        """
        if self.exact:
            raise ValueError("--judge exact has no language model to ask: name one, as in --judge gpt-4-0613")
        results: list[T | None] = [None] * len(requests)
        pending = list(range(len(requests)))
        for attempt in range(attempts):
            if not pending:
                break
            again = attempt > 0 and retry is not None
            asked = [retry(requests[place], attempt) if again else requests[place] for place in pending]
            for place, reply in zip(pending, self._replies(asked, attempt), strict=True):
                results[place] = parse(reply)
            pending = [place for place in pending if results[place] is None]
        return results

    def _replies(self, requests: Sequence[Request], attempt: int) -> list[str]:
        """Replies in the requests' order. The attempt is a part of their names: another one is another reply."""
        names, records = [], {}
        for request in requests:
            record = _record(self.model, request, attempt)
            names.append(hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest())
            records[names[-1]] = record
        replies = {name: reply for name in records if (reply := self._cached(name)) is not None}
        missing = [name for name in records if name not in replies]
        failures: list[str] = []
        with tqdm(
            total=len(records),
            initial=len(replies),
            desc=f"judge {self.model}" + (f", attempt {attempt + 1}" if attempt else ""),
            unit="reply",
            postfix={"cached": len(replies)},
        ) as progress:
            pool = ThreadPoolExecutor(self._workers)
            futures = {pool.submit(self._fetch, name, records[name]): name for name in missing}
            in_a_row = 0
            try:
                for future in as_completed(futures):
                    try:
                        replies[futures[future]] = future.result()
                    except _NoReplyError as error:
                        failures.append(str(error))
                        in_a_row += 1
                        if in_a_row >= self._workers:  # down for all: the others would only wait as long in vain
                            break
                    else:
                        in_a_row = 0
                        progress.update()
            finally:
                pool.shutdown(cancel_futures=True)  # waits for those under way: they are paid for
        if failures:
            left = sum(self._cached(name) is None for name in records)
            raise OSError(
                f"{left} of {len(records)} replies of the judge {self.model} are missing: {failures[-1]}. Those that "
                f"came are kept in {self._cache}: the same command goes on from there"
            )
        return [replies[name] for name in names]

    def _fetch(self, name: str, record: Mapping[str, Any]) -> str:
        """Ask the server until there is a reply, and put it into the cache."""
        import openai  # noqa: PLC0415 - slow to import, and an extra

        where = self._client.base_url
        arguments = {key: value for key, value in record.items() if key != "attempt"}
        for repetition in range(_RETRIES + 1):
            try:
                # The body as it is: the package would take anything for a reply.
                body = self._client.chat.completions.with_raw_response.create(**arguments).http_response.text
            except openai.APIStatusError as error:
                if error.status_code in (408, 409, 429) or error.status_code >= 500:
                    raise _NoReplyError(f"{where} answers with {_status(error)}") from error
                raise ValueError(self._refusal(error)) from error
            except openai.APIConnectionError as error:
                reason = f"{error} {error.__cause__ or ''}".strip()
                raise _NoReplyError(f"{where} cannot be reached ({reason})") from error
            reply = _content(body)
            if reply is not None:
                self._keep(name, {"request": record, **reply})
                return reply["reply"]
            if repetition < _RETRIES:
                time.sleep(min(_FIRST_WAIT * 2**repetition, _LONGEST_WAIT))
        raise _NoReplyError(f"{where} answers with what is no chat completion ({body[:200]!r})")

    def _refusal(self, error: Any) -> str:
        where = self._client.base_url
        said = _status(error)
        kept = f"Replies that came are kept in {self._cache}: the same command goes on from there"
        if error.status_code in (401, 403):
            return f"{where} refuses the key ({said}): set OPENAI_API_KEY to one that may use {self.model}. {kept}"
        if error.status_code == 404:
            return (
                f"{where} has no {self.model} ({said}): name another model with --judge, or set OPENAI_BASE_URL to an "
                f"endpoint that has it. {kept}"
            )
        return f"{where} refuses what it is asked ({said}): give a --judge that takes such requests. {kept}"

    def _path(self, name: str) -> Path:
        return self._cache / f"{name}.json"

    def _cached(self, name: str) -> str | None:
        try:
            reply = json.loads(self._path(name).read_bytes())["reply"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # there is none, or somebody damaged it: asked again
        return reply if isinstance(reply, str) else None

    def _keep(self, name: str, content: Mapping[str, Any]) -> None:
        path = self._path(name)
        safe = "The replies that came before are kept: the same command goes on from there"
        write_atomically(path, json.dumps(content, indent=1), safe, shared=True)


def _record(model: str, request: Request, attempt: int) -> dict[str, Any]:
    settings = {"temperature": request.temperature, "max_tokens": request.max_tokens}
    return {
        "model": model,
        "attempt": attempt,
        "messages": [dict(message) for message in request.messages],
        **{name: value for name, value in settings.items() if value is not None},
    }


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


def exact_judge() -> Judge:
    """The proxy for a judge: no language model; benchmarks compare strings, see :func:`normalized_match`."""
    return Judge(EXACT)


def api_judge(model: str, cache: Path, workers: int = 8, timeout: float = 60.0) -> Judge:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        model: as the endpoint calls it.
        cache: folder of its replies, a file for each.
        workers: how many requests are under way at a time.
        timeout: of one request, in seconds.

    Raises:
        ValueError: there is no key in the environment, or the model's name is that of the proxy.
        ImportError: the package ``openai`` is not installed.
    """
    if model == EXACT:
        raise ValueError(f"the judge {EXACT!r} is the offline proxy, not a model of an endpoint")
    if not os.environ.get("OPENAI_API_KEY", "").strip():
        raise ValueError(
            f"the judge {model} needs a key: set OPENAI_API_KEY (to anything, if the server at OPENAI_BASE_URL asks "
            f"for none), or take --judge {EXACT}, the offline proxy, where the benchmark has one"
        )
    try:
        import openai  # noqa: PLC0415 - slow to import, and an extra
    except ImportError as error:
        raise ImportError(f"the judge {model} needs the package openai: pip install 'visionzip[eval]'") from error
    return Judge(model, openai.OpenAI(max_retries=_RETRIES, timeout=timeout), cache, workers)


def normalized_match(prediction: str, answer: str) -> bool:
    """Whether a model's words have the answer in them: the deterministic proxy for a judge of short answers.

    Both are lowercased and lose punctuation (but for a number's sign and point) and articles; then they are equal, or
    the answer's words follow each other somewhere in the prediction. Our own, no benchmark's: compare only with itself.
    """
    said, wanted = _words(prediction), _words(answer)
    if not wanted:  # nothing but punctuation or an article
        return prediction.strip().lower() == answer.strip().lower()
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


def _words(text: str) -> list[str]:
    text = re.sub(r"['\u2019]|(?<=\d),(?=\d{3})", "", text.lower())
    return [word for word in _WORDS.findall(text) if word not in _ARTICLES]

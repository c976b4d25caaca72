"""A language model as judge, behind any OpenAI-compatible endpoint; and the strings' comparison that stands in for it.

The endpoint and its key come from the environment: ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``, as the package
``openai`` reads them. Every reply that can be read is a file in the cache from the moment it comes, so that nothing is
paid for twice and a killed run goes on where it was. One that cannot be read is asked for again, up to a limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from llava.files import write_atomically
from llava.screen import progress

from .endpoint import PATIENCE, Line, NoReplyError, RefusedError

T = TypeVar("T")

EXACT = "exact"
ATTEMPTS = 5  # of one answer, until a reply can be read: MM-Vet's
_HOPELESS = 20  # answers judged, as often as may be, without one readable reply: the others are not paid for
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


class Judge:
    """A language model that judges, or the proxy for one; made by :func:`api_judge` and :func:`exact_judge`.

    Attributes:
        model: its name, for the results; ``exact`` for the proxy.
        exact: there is no language model: benchmarks compare strings themselves, and label their score as a proxy.
    """

    def __init__(
        self,
        model: str,
        client: Any = None,
        cache: Path | None = None,
        workers: int = 1,
        attempts: int = ATTEMPTS,
        patience: float = PATIENCE,
    ) -> None:
        self.model = model
        self.exact = client is None
        self._client = client
        self._cache = cache
        self._workers = workers
        self._attempts = attempts
        self._patience = patience

    def ask(
        self,
        requests: Sequence[Request],
        parse: Callable[[str], T | None],
        retry: Callable[[Request, int], Request] | None = None,
        clear: Callable[[T], bool] = lambda result: True,
    ) -> list[T | None]:
        """Judge what has no readable reply in the cache. A bar on standard error shows how far it is.

        Args:
            requests: what to judge; equal ones are asked once.
            parse: makes the result of a reply; None where it cannot be read.
            retry: how it is asked again: the request as it was at first, and how often it has been asked (1, 2, …).
                None asks the same.
            clear: whether a result is one; a reply whose is not counts as one that cannot be read.

        Returns:
            The results in the requests' order. Where no reply could be read, however often it was asked (these are in
            the folder ``unreadable`` of the cache, for people to look at, and are asked again next time): that of the
            last one with a result, else None.

        Raises:
            ValueError: the server refuses (key, model, request), no reply at all can be read, or this judge is the
                proxy. The readable replies that there are stay in the cache.
            OSError: the server cannot be reached or gives no replies. The same.
        """
        if self.exact:
            raise ValueError("--judge exact has no language model to ask: name one, as in --judge gpt-4-0613")
        reading = _Reading(self, parse, retry, clear)
        names = [_name(_record(self.model, request, 0)) for request in requests]
        distinct = dict(zip(names, requests, strict=True))
        found = {name: result for name, one in distinct.items() if (result := reading.kept(one)) is not None}
        missing = [name for name in distinct if name not in found]
        readable, unread, failures = len(found), 0, []
        line = Line(self._client, self._patience)
        with progress(len(distinct), f"judge {self.model}, cached={len(found)}", "replies", len(found)) as bar:
            pool = ThreadPoolExecutor(self._workers)
            futures = {pool.submit(reading.ask, distinct[name], line): name for name in missing}
            in_a_row = 0
            try:
                for future in as_completed(futures):
                    try:
                        found[futures[future]], is_clear = future.result()
                    except NoReplyError as error:
                        failures.append(str(error))
                        in_a_row += 1
                        if in_a_row >= self._workers:  # down for all: the others would only wait as long in vain
                            break
                    else:
                        in_a_row = 0
                        bar.update()
                        readable, unread = readable + is_clear, unread + (not is_clear)
                        if not readable and unread >= _HOPELESS:
                            break
            except RefusedError as error:
                raise ValueError(f"{error}. {self._kept}") from error
            finally:
                line.close()
                pool.shutdown(cancel_futures=True)  # waits for those under way: they are paid for
        if failures:
            left = sum(reading.kept(request) is None for request in distinct.values())
            raise OSError(
                f"{left} of {len(distinct)} replies of the judge {self.model} are missing: {failures[0]}. {self._kept} "
                "when it answers, or with OPENAI_BASE_URL set to one that does"
            )
        if distinct and not readable:
            said = f"the last says {str(_read(reading.last))[:100]!r}, see {reading.last}"
            raise ValueError(
                f"none of the replies of the judge {self.model} at {self._client.base_url} can be read ({unread} "
                f"answers were judged, each up to {self._attempts} times; {said}): name a --judge that replies in the "
                "form that is asked for, or set OPENAI_BASE_URL to another endpoint, and the same command asks again"
            )
        return [found[name] for name in names]

    @property
    def _kept(self) -> str:
        return f"Replies that came are kept in {self._cache}: the same command goes on from there"


class _Reading(Generic[T]):
    """How the replies to some requests are had and read; see :meth:`Judge.ask`.

    Attributes:
        last: the file with the last reply that could not be read.
    """

    def __init__(
        self,
        judge: Judge,
        parse: Callable[[str], T | None],
        retry: Callable[[Request, int], Request] | None,
        clear: Callable[[T], bool],
    ) -> None:
        self._judge, self._parse, self._retry, self._clear = judge, parse, retry, clear
        self.last: Path | None = None

    def _tries(self, request: Request) -> Iterator[dict[str, Any]]:
        """What is sent for a request: at first, and again. The attempt is a part of it: each has its own reply."""
        for attempt in range(self._judge._attempts):
            again = attempt > 0 and self._retry is not None
            yield _record(self._judge.model, self._retry(request, attempt) if again else request, attempt)

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
        return self._judge._cache / f"{_name(record)}.json"


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


def marked(metric: str, unjudged: int, answers: int, fate: str) -> str:
    """A metric's name, which says so where the judge has not judged all answers.

    Args:
        metric: what the score is, in words.
        unjudged: answers about which no reply could be read.
        answers: that were to be judged.
        fate: what becomes of these, as in ``"count as wrong"``.
    """
    if not unjudged:
        return metric
    return f"{metric}; INCOMPLETE: no readable reply of the judge about {unjudged} of {answers} answers, which {fate}"


def exact_judge() -> Judge:
    """The proxy for a judge: no language model; benchmarks compare strings, see :func:`normalized_match`."""
    return Judge(EXACT)


def api_judge(
    model: str,
    cache: Path,
    workers: int = 8,
    timeout: float = 60.0,
    attempts: int = ATTEMPTS,
    patience: float = PATIENCE,
) -> Judge:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        model: as the endpoint calls it.
        cache: folder of its replies, a file for each.
        workers: how many requests are under way at a time.
        timeout: of one request, in seconds.
        attempts: how often it is asked about one answer at most, until a reply can be read.
        patience: seconds without any reply after which the endpoint is given up.

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
        raise ImportError(f'the judge {model} needs the package openai: pip install "llava-visionzip[eval]"') from error
    return Judge(model, openai.OpenAI(max_retries=0, timeout=timeout), cache, workers, attempts, patience)


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

"""A language model as judge, behind any OpenAI-compatible endpoint; or the proxy for one (see proxy.py).

The endpoint and its key come from the environment: ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``, as the package
``openai`` reads them. Every reply that can be read is a file in the cache from the moment it comes, so that nothing is
paid for twice and a killed run goes on where it was. One that cannot be read is asked for again, up to a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from llava.commands.screen import progress

from .endpoint import PATIENCE, Line, NoReplyError, RefusedError
from .replies import Replies, Request, T

EXACT = "exact"
ATTEMPTS = 5  # of one answer, until a reply can be read: MM-Vet's
_HOPELESS = 20  # answers judged, as often as may be, without one readable reply: the others are not paid for


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
        replies = Replies(self.model, self._cache, self._attempts, parse, retry, clear)
        names = [replies.name(request) for request in requests]
        distinct = dict(zip(names, requests, strict=True))
        found = {name: result for name, one in distinct.items() if (result := replies.kept(one)) is not None}
        kept = len(found)
        readable, unread, failures = self._ask_missing(replies, distinct, found)
        if failures:
            left = sum(replies.kept(request) is None for request in distinct.values())
            raise OSError(
                f"{left} of {len(distinct)} replies of the judge {self.model} are missing: {failures[0]}. {self._kept} "
                "when it answers, or with OPENAI_BASE_URL set to one that does"
            )
        if distinct and not kept + readable:
            raise ValueError(
                f"none of the replies of the judge {self.model} at {self._client.base_url} can be read ({unread} "
                f"answers were judged, each up to {self._attempts} times; the last says {replies.last_words()!r}, see "
                f"{replies.last}): name a --judge that replies in the form that is asked for, or set OPENAI_BASE_URL "
                "to another endpoint, and the same command asks again"
            )
        return [found[name] for name in names]

    def _ask_missing(
        self, replies: Replies[T], distinct: Mapping[str, Request], found: dict[str, T | None]
    ) -> tuple[int, int, list[str]]:
        """Ask for the replies that are missing, several at a time, and put the results into ``found``.

        Returns:
            How many clear replies and how many others came, and why further ones did not.
        """
        missing = {name: request for name, request in distinct.items() if name not in found}
        kept, clear, unread, failures, in_a_row = len(found), 0, 0, [], 0
        line = Line(self._client, self._patience)
        with progress(len(distinct), f"judge {self.model}, cached={kept}", "replies", kept) as bar:
            pool = ThreadPoolExecutor(self._workers)
            futures = {pool.submit(replies.ask, request, line): name for name, request in missing.items()}
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
                        clear, unread = clear + is_clear, unread + (not is_clear)
                        if not kept + clear and unread >= _HOPELESS:
                            break
            except RefusedError as error:
                raise ValueError(f"{error}. {self._kept}") from error
            finally:
                line.close()
                pool.shutdown(cancel_futures=True)  # waits for those under way: they are paid for
        return clear, unread, failures

    @property
    def _kept(self) -> str:
        return f"Replies that came are kept in {self._cache}: the same command goes on from there"


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
    """The proxy for a judge: no language model; benchmarks compare strings, see :mod:`eval.scoring.proxy`."""
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

"""Work of the model in a thread of its own: what it writes as it comes, progress, and an end at the next token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import StoppingCriteria, TextStreamer

from llava.demo.conversation.talk import StoppedError

Put = Callable[[Any], None]
_TICK = 1.0  # seconds without news, after which the page says that it is still at work


class Stop(StoppingCriteria):
    """Ends generation at the next token when asked to."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        """Look whether to go on."""
        if self.is_stopped():
            raise StoppedError
        return False


class Words(TextStreamer):
    """Hands on an answer word by word."""

    def __init__(self, tokenizer: Any, put: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._put = put

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on some whole words."""
        self._put(text)


def stream(work: Callable[[Put], None]) -> Iterator[Any]:
    """Run work in a thread of its own and yield what it puts; None each second without news.

    Raises:
        Exception: what the work raises.
    """
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            work(lambda item: news.put(("item", item)))
            news.put(("end", None))
        except BaseException as error:
            news.put(("error", error))

    threading.Thread(target=run, daemon=True).start()
    while True:
        try:
            kind, item = news.get(timeout=_TICK)
        except queue.Empty:
            yield None
            continue
        if kind == "error":
            raise item
        if kind == "end":
            return
        yield item

"""Who is there: each visitor's conversation, by the session of the browser's tab."""

from __future__ import annotations

import threading
from collections import OrderedDict

from llava.demo.conversation.desk import Desk
from llava.demo.conversation.talk import Talk

_REMEMBERED = 10_000  # ended ones, so that who comes back is told and not answered without its images
MAX_VISITORS = 64  # conversations that are kept; of more, the one that was idle longest ends


class Visitors:
    """Conversations by session: nobody gets another's, and what has left is forgotten."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def talk(self, session: str) -> Talk:
        """The conversation of a session, begun if there is none.

        Raises:
            ValueError: it was ended for others.
        """
        gone = []
        with self._lock:
            if session in self._ended:
                raise ValueError(
                    f"this conversation has ended, as {MAX_VISITORS} others came: reload the page to begin a new one"
                )
            talk = self._talks.setdefault(session, Talk())
            self._talks.move_to_end(session)
            while len(self._talks) > MAX_VISITORS:
                other, ended = self._talks.popitem(last=False)
                gone.append(ended)
                self._ended[other] = None
            while len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)
        for other in gone:
            self._desk.leave(other)
        return talk

    def leave(self, session: str) -> None:
        """Forget a session whose tab was closed."""
        with self._lock:
            talk = self._talks.pop(session, None)
        if talk is not None:
            self._desk.leave(talk)

    def __len__(self) -> int:
        return len(self._talks)

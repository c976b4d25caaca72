"""Who is there: each visitor's conversation, by the session of the browser's tab."""

from __future__ import annotations

import threading
from collections import OrderedDict

from llava.demo.desk import Desk
from llava.demo.talk import Talk

MAX_VISITORS = 64  # conversations that are kept; of more, the one that was idle longest ends


class Visitors:
    """Conversations by session: nobody gets another's, and what has left is forgotten."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._lock = threading.Lock()

    def talk(self, session: str) -> Talk:
        """The conversation of a session, begun if there is none."""
        gone = []
        with self._lock:
            talk = self._talks.setdefault(session, Talk())
            self._talks.move_to_end(session)
            while len(self._talks) > MAX_VISITORS:
                gone.append(self._talks.popitem(last=False)[1])
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

"""The page's one model: vanilla and zipped answer the same questions on it, one turn at a time."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from PIL import Image

from llava.demo.conversation.setting import Setting
from llava.demo.conversation.streaming import Put, Stop, Words, stream
from llava.demo.conversation.talk import Answer, Exchange, Picture, StoppedError, Talk
from llava.demo.models.page_model import PageModel, Side
from llava.demo.uploads.images import Upload
from llava.video import Visual

KEPT_CACHES = 16  # conversations whose KV caches stay; of older ones the next turn fills it anew
SIDES = ("vanilla", "zipped")


class Desk:
    """The model, and who may use it: one turn at a time, as VisionZip is switched on and off in place.

    Args:
        page_model: it.
        **generate_kwargs: as :class:`llava.serve.chat.ChatSession` has them.
    """

    def __init__(self, page_model: PageModel, **generate_kwargs: Any) -> None:
        self.page_model, self.model, self.generate_kwargs = page_model, page_model.model, generate_kwargs
        self.patches = page_model.patches
        self.default = self._default_setting()
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, Talk] = OrderedDict()

    def _default_setting(self) -> Setting:
        """The model's own, or else the paper's middle one: 128 tokens of 576."""
        own = self.page_model.default()
        if own is None:
            return Setting(max(1, round(self.patches * 2 / 9)))
        split = (own.dominant, own.contextual) if own.keep is None else None
        rest = {"layer": own.layer, "merge": own.merge, "seed": own.seed, "split": split}
        rest |= {"max_tokens": own.max_tokens, "min_tokens": own.min_tokens, "video_keep": own.video_keep}
        keep = own.tokens(self.patches) if self.patches else own.keep
        if not self.patches and not isinstance(keep, float):
            # Images have any size there, and the page's slider has shares: the model's number is the most of each.
            keep, rest["max_tokens"] = 1.0, own.tokens(1)
        return Setting(keep, own.method, own.positions, own.size_bias, **rest)

    def _side(self, is_stopped: Callable[[], bool]) -> Side:
        side = self.page_model.side(**self.generate_kwargs, stopping_criteria=[Stop(is_stopped)])
        side.is_stopped = is_stopped
        return side

    def warm_up(self) -> None:
        """Answer once on both sides, so that the first visitor does not wait for kernels to be loaded."""
        talk = Talk()
        talk.add([Upload("white", _white())])
        for _ in self.ask(talk, "What is it?", self.default):
            pass
        self.leave(talk)

    def picture(self, picture: Picture, setting: Setting, pairs: bool = False) -> dict[str, Any]:
        """What :func:`llava.picture.picture_data` says of a picture under a setting, or under its picks."""
        visual = picture.upload.open()
        with self._lock:
            setting.put_on(self.model)
            return self.page_model.picture(visual, picture.picks, pairs)

    def ask(self, talk: Talk, question: str, setting: Setting) -> Iterator[Exchange]:
        """Ask both sides the next question; yields the exchange as it grows, and then stands in ``talk.exchanges``.

        Raises:
            StoppedError: the user has stopped it.
            ValueError: the question is empty, or what :meth:`ChatSession.ask` and the setting raise. The conversation
                is then as it was, also on the side that has answered.
        """
        if not question.strip():
            raise ValueError("the question is empty: write one")
        exchange = Exchange(talk.next_number(), question.strip(), list(talk.waiting), str(setting))
        yield from self._run(talk, exchange, list(talk.exchanges), setting, SIDES)
        talk.exchanges.append(exchange)
        talk.waiting = []

    def ask_again(self, talk: Talk, setting: Setting) -> Iterator[Exchange]:
        """Ask the zipped side the last question again, in the place of its answer; vanilla's stands.

        Raises:
            ValueError: nothing was asked yet, and as in :meth:`ask`.
            StoppedError: the user has stopped it; the old answer stands.
        """
        if not talk.exchanges:
            raise ValueError("nothing was asked yet: ask a question first")
        last = talk.exchanges[-1]
        exchange = Exchange(last.number, last.question, last.pictures, str(setting))
        exchange.take_over(last, "vanilla")
        yield from self._run(talk, exchange, talk.exchanges[:-1], setting, SIDES[1:])
        talk.exchanges[-1] = exchange

    def _run(
        self, talk: Talk, exchange: Exchange, before: list[Exchange], setting: Setting, slots: Sequence[str]
    ) -> Iterator[Exchange]:
        def work(put: Put, is_stopped: Callable[[], bool]) -> None:
            with self._lock:
                for slot in slots:
                    try:
                        if refused := [turn.refused[slot] for turn in before if slot in turn.refused]:
                            raise ValueError(refused[-1])
                        self._answer(talk, exchange, before, setting, slot, is_stopped, put)
                    except ValueError as error:
                        if slot == slots[-1]:
                            raise
                        exchange.refused[slot] = str(error)  # too long for it, say, which zipped is not
                self._remember(talk)

        for _ in _stoppable(talk, work):
            yield exchange

    def _answer(
        self,
        talk: Talk,
        exchange: Exchange,
        before: list[Exchange],
        setting: Setting,
        slot: str,
        is_stopped: Callable[[], bool],
        put: Put,
    ) -> None:
        if is_stopped():
            raise StoppedError
        zipped = slot == "zipped"
        if zipped:
            setting.put_on(self.model)
        else:
            self.page_model.vanilla()
        exchange.partial[slot] = ""
        put(None)
        side = talk.sides[slot] = talk.sides.get(slot) or self._side(is_stopped)
        side.is_stopped = is_stopped
        side.generate_kwargs["stopping_criteria"] = [Stop(is_stopped)]
        # As they are now: the visitor may pick others while the answer comes.
        picks = {id(picture): picture.picks for turn in (*before, exchange) for picture in turn.pictures if zipped}
        if any(picks.get(id(picture)) for picture in exchange.pictures):
            exchange.setting += ", patches picked by hand"

        def write(text: str) -> None:
            exchange.partial[slot] += text
            put(None)

        def key(turns: Sequence[Exchange]) -> Any:
            seen = [picks.get(id(picture)) for turn in turns for picture in turn.pictures]
            return [turn.number for turn in turns], [setting, seen] if zipped else None

        def opened(turn: Exchange) -> list[Visual]:
            return [picture.upload.open() for picture in turn.pictures]

        side.picks = [picks.get(id(picture)) for turn in (*before, exchange) for picture in turn.pictures]
        start = perf_counter()
        if side.holds != key(before):
            side.holds = None
            side.resume([(turn.question, opened(turn), turn.answers[slot].turn.text) for turn in before])
        again = perf_counter() - start
        side.holds = None
        turn = side.ask(exchange.question, opened(exchange), Words(self.page_model.tokenizer, write))
        side.holds = key([*before, exchange])
        first_token = again + turn.vision_seconds + turn.prefill_seconds
        exchange.answers[slot] = Answer(turn, side.visual_tokens, first_token)
        put(None)

    def _remember(self, talk: Talk) -> None:
        """Keep the caches of the latest conversations only."""
        self._recent[id(talk)] = talk
        self._recent.move_to_end(id(talk))
        while len(self._recent) > KEPT_CACHES:
            self._recent.popitem(last=False)[1].drop_caches()

    def leave(self, talk: Talk) -> None:
        """A visitor is gone, or begins anew."""
        talk.stop()
        self._recent.pop(id(talk), None)
        talk.drop_caches()

    def compare(
        self, talk: Talk, picture: Picture, question: str, keep: int | float, methods: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, Any] | None, Answer | str]]:
        """Ask one question about one image or video under each method.

        Yields:
            The method (``"vanilla"`` first), its picture and its answer; or None and the line that says why there is
            none.

        Raises:
            StoppedError: the user has stopped it.
        """
        if not question.strip():
            raise ValueError("the question is empty: write one")
        visual = picture.upload.open()

        def work(put: Put, is_stopped: Callable[[], bool]) -> None:
            for method in ("vanilla", *methods):
                with self._lock:  # others get their turns in between
                    if is_stopped():
                        raise StoppedError
                    put(self._compared(method, visual, question, keep, is_stopped))

        yield from _stoppable(talk, work)

    def _compared(
        self, method: str, visual: Visual, question: str, keep: int | float, is_stopped: Callable[[], bool]
    ) -> tuple[str, dict[str, Any] | None, Answer | str]:
        try:
            if method == "vanilla":
                self.page_model.vanilla()
            else:
                own = {"positions": None, "size_bias": None}  # each method's
                replace(self.default, keep=keep, method=method, **own).put_on(self.model)
            side = self._side(is_stopped)
            turn = side.ask(question, [visual])
            shown = self.page_model.picture(visual)
            return method, shown, Answer(turn, side.visual_tokens, turn.vision_seconds + turn.prefill_seconds)
        except (ValueError, TypeError) as error:
            return method, None, str(error)


def _stoppable(talk: Talk, work: Callable[[Put, Callable[[], bool]], None]) -> Iterator[Any]:
    """What work puts, until the visitor stops it or has left."""
    stopped = talk.stopped()
    gone = threading.Event()
    try:
        yield from stream(lambda put: work(put, lambda: stopped() or gone.is_set()))
    finally:
        gone.set()  # the next token is the last
    if stopped():  # at the last moment
        raise StoppedError


def _white() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    return file.getvalue()

"""What the page does when a visitor does something: from the controls' values to what changes on the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from llava.demo import show
from llava.demo.desk import Desk
from llava.demo.examples import Example
from llava.demo.talk import Setting, Talk
from llava.demo.uploads import read_uploads
from visionzip.methods import METHODS

TOKENS, SHARE = "tokens", "percent"
OWN = "the method's own"
POSITIONS = {OWN: None, "consecutive": "consecutive", "original": "original"}
SIZE_BIAS = {OWN: None, "on": True, "off": False}
Change = dict[str, Any]  # new values of components by name
_EVERY = 0.08  # seconds between two states of a growing answer


class Handlers:
    """All of them; each takes a visitor's conversation and the controls, and says what changes.

    Args:
        desk: the model.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def setting(self, method: str, unit: str, budget: float, positions: str = OWN, size_bias: str = OWN) -> Setting:
        """What the controls say.

        Raises:
            ValueError: no such method or choice, or the budget is outside its limits.
        """
        for value, known in (
            (method, METHODS),
            (unit, (TOKENS, SHARE)),
            (positions, POSITIONS),
            (size_bias, SIZE_BIAS),
        ):
            if value not in known:
                raise ValueError(f"{value!r} is unknown: use one of {', '.join(known)}")
        top = self.desk.patches if unit == TOKENS else 100
        if not isinstance(budget, int | float) or not 1 <= budget <= top:
            raise ValueError(f"a budget of {budget} is outside 1 to {top} {unit}")
        keep = round(budget) if unit == TOKENS else budget / 100
        chosen = {"positions": POSITIONS[positions], "size_bias": SIZE_BIAS[size_bias]}
        return replace(self.desk.default, keep=keep, method=method, **chosen)  # layer, merge and seed stay the model's

    def _picture(self, talk: Talk, setting: Setting, view: str | None = None, layer: int | None = None) -> str:
        if not talk.pictures:
            return ""
        return show.picture(talk, self.desk.picture(talk.pictures[talk.selected], setting), view, layer)

    def limits(self, talk: Talk, unit: str, budget: float) -> Change:
        """The slider goes on in other units, with what comes closest to its budget."""
        patches = self.desk.patches
        if unit == TOKENS:
            value = min(patches, max(1, round(budget * patches / 100)))
            return {"budget": gr.Slider(maximum=patches, value=value, label="Tokens of each image or tile")}
        value = min(100, max(1, round(100 * budget / patches)))
        return {"budget": gr.Slider(maximum=100, value=value, label="Percent of the patches")}

    def add_images(self, talk: Talk, text: str, *controls: Any) -> Change:
        """Put uploaded images to the next question."""
        if not text:
            return {}
        talk.add(read_uploads(text, [picture.upload for picture in talk.pictures]))
        number = len(talk.waiting)
        line = f"{number} image{'s' if number > 1 else ''} for the next question"
        return {"uploads": "", "picture": self._picture(talk, self.setting(*controls)), "status": show.status(line)}

    def redraw(self, talk: Talk, *controls: Any) -> Change:
        """Another setting chooses anew; picks are dropped."""
        setting = self.setting(*controls)
        for picture in talk.pictures:
            picture.picks = None
        line = f"{setting}: ask again to see what it answers" if talk.exchanges else ""
        return {"picture": self._picture(talk, setting), "status": show.status(line)}

    def choose(self, talk: Talk, event: gr.EventData, *controls: Any) -> Change:
        """Show another image of the conversation."""
        number = event.image
        if type(number) is not int or not 0 <= number < len(talk.pictures):
            raise ValueError(f"there is no image {number!r}: the conversation has {len(talk.pictures)}")
        talk.selected = number
        return {"picture": self._picture(talk, self.setting(*controls))}

    def pick(self, talk: Talk, event: gr.EventData, *controls: Any) -> Change:
        """Keep the patches that were picked by hand of an image, or leave them to the method again."""
        if event.number <= talk.seen_pick and event.number != 1:  # a later one has overtaken it
            return {}
        talk.seen_pick = event.number
        if type(event.image) is not int or not 0 <= event.image < len(talk.pictures):
            raise ValueError(f"there is no image {event.image!r}: the conversation has {len(talk.pictures)}")
        picks = event.patches
        talk.pictures[event.image].picks = None if picks is None else tuple(tuple(map(int, tile)) for tile in picks)
        return {"status": show.status("ask again to see what it answers" if talk.exchanges else "")}

    def begin(self, talk: Talk) -> Change:
        """A question comes."""
        talk.begin()
        return {"status": show.status("waiting for the model …", busy=True)}

    def stop(self, talk: Talk) -> Change:
        """Stop the answer at the next token; what is stopped says so itself."""
        talk.stop()
        return {}

    def forget(self, talk: Talk) -> Change:
        """Begin anew."""
        self.desk.leave(talk)
        talk.forget()
        return {"picture": "", "conversation": show.conversation([]), "status": "", "question": "", "strip": ""}

    def ask(self, talk: Talk, question: str, *controls: Any) -> Iterator[Change]:
        """Ask the next question."""
        growing = self.desk.ask(talk, question, self.setting(*controls))
        yield from self._grow(talk, growing, list(talk.exchanges))
        yield {"conversation": show.conversation(talk.exchanges), "status": show.status("answered")}

    def ask_again(self, talk: Talk, *controls: Any) -> Iterator[Change]:
        """Ask the last question again under the present setting."""
        yield from self._grow(talk, self.desk.ask_again(talk, self.setting(*controls)), talk.exchanges[:-1])
        yield {"conversation": show.conversation(talk.exchanges), "status": show.status("answered again")}

    def _grow(self, talk: Talk, growing: Iterator[Any], before: list[Any]) -> Iterator[Change]:
        start = last = time.monotonic()
        for exchange in growing:
            if (now := time.monotonic()) - last < _EVERY:
                continue
            last = now
            line = f"answering, {now - start:.0f} s …" if exchange else f"waiting for the model, {now - start:.0f} s …"
            yield {
                "conversation": show.conversation([*before, *([exchange] if exchange else [])]),
                "status": show.status(line, busy=True),
            }

    def example(self, talk: Talk, example: Example, *controls: Any) -> Change:
        """Begin anew with an example's image and question."""
        self.forget(talk)
        talk.begin()
        talk.add([example.upload()])
        return {
            "picture": self._picture(talk, self.setting(*controls), example.view, example.layer),
            "conversation": show.conversation([]),
            "status": show.status(example.hint),
            "question": example.question,
        }

    def compare(self, talk: Talk, question: str, *controls: Any) -> Iterator[Change]:
        """Ask one question about the shown image under each method."""
        setting = self.setting(*controls)
        if not talk.pictures:
            raise ValueError("there is no image to compare on: add one first")
        question = question.strip() or (talk.exchanges[-1].question if talk.exchanges else "")
        shown, rows = talk.pictures[talk.selected], []
        for row in self.desk.compare(talk, shown, question, setting.keep, list(METHODS)):
            if row is not None:
                rows.append(row)
            line = f"{len(rows)} of {len(METHODS) + 1} methods: {question}"
            busy = len(rows) <= len(METHODS)
            yield {"strip": show.strip(shown, rows), "status": show.status(line, busy=busy)}

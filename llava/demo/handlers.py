"""What the page does when a visitor does something: from the controls' values to what changes on the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from llava.demo.conversation.desk import Desk
from llava.demo.conversation.setting import Setting
from llava.demo.conversation.talk import Talk
from llava.demo.drawing import pictures, words
from llava.demo.examples import Example
from llava.demo.uploads.images import Upload, read_uploads
from llava.demo.uploads.videos import read_clips
from visionzip.methods import METHODS

TOKENS, SHARE = "tokens", "percent"
LABELS = {TOKENS: "Tokens of each image or tile", SHARE: "Percent of the patches"}
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
        self.units = (TOKENS, SHARE) if desk.patches else (SHARE,)  # that a budget can be in

    def budget(self) -> tuple[str, int, int]:
        """What the controls begin with: unit, top and value of the slider."""
        own, patches = self.desk.default, self.desk.patches
        if not patches:
            return SHARE, 100, max(1, round(100 * own.keep))
        return TOKENS, patches, min(patches, own.keep)

    def setting(self, method: str, unit: str, budget: float, positions: str = OWN, size_bias: str = OWN) -> Setting:
        """What the controls say.

        Raises:
            ValueError: no such method or choice, or the budget is outside its limits.
        """
        for value, known in (
            (method, METHODS),
            (unit, self.units),
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
        talk.setting = setting
        if not talk.pictures:
            return ""
        data = self.desk.picture(talk.pictures[talk.selected], setting, talk.pairs)
        return pictures.picture(talk, data, view, layer)

    def limits(self, talk: Talk, unit: str, budget: float) -> Change:
        """The slider goes on in other units, with what comes closest to its budget."""
        patches = self.desk.patches
        if unit == TOKENS:
            value = min(patches, max(1, round(budget * patches / 100)))
            return {"budget": gr.Slider(maximum=patches, value=value, label=LABELS[TOKENS])}
        value = min(100, max(1, round(100 * budget / patches)))
        return {"budget": gr.Slider(maximum=100, value=value, label=LABELS[SHARE])}

    def add_images(self, talk: Talk, text: str, *controls: Any) -> Change:
        """Put uploaded images to the next question."""
        if not text:
            return {}
        talk.add(read_uploads(text, [picture.upload for picture in talk.pictures]))
        number = sum(isinstance(picture.upload, Upload) for picture in talk.waiting)
        line = f"{number} image{'s' if number > 1 else ''} for the next question"
        return {"uploads": "", "picture": self._picture(talk, self.setting(*controls)), "status": words.status(line)}

    def add_videos(self, talk: Talk, text: str, frames: float, *controls: Any) -> Change:
        """Put uploaded videos to the next question, of each so many frames."""
        if not text:
            return {}
        clips = read_clips(text, frames, [picture.upload for picture in talk.pictures])
        talk.add(clips)
        line = f"{frames:.0f} frames of {', '.join(clip.name for clip in clips)} for the next question"
        return {"clips": "", "picture": self._picture(talk, self.setting(*controls)), "status": words.status(line)}

    def redraw(self, talk: Talk, *controls: Any) -> Change:
        """Another setting chooses anew; picks are dropped."""
        setting = self.setting(*controls)
        if setting == talk.setting:  # it has gone back, or was said twice
            return {}
        talk.drop_picks()
        line = f"{setting}: ask again to see what it answers" if talk.exchanges else ""
        return {"picture": self._picture(talk, setting), "status": words.status(line)}

    def choose(self, talk: Talk, event: gr.EventData, *controls: Any) -> Change:
        """Show another image of the conversation, or also what its patches attend to."""
        number = event.image
        if type(number) is not int or not 0 <= number < len(talk.pictures):
            raise ValueError(f"there is no image {number!r}: the conversation has {len(talk.pictures)}")
        talk.selected, talk.pairs = number, event.pairs is True
        return {"picture": self._picture(talk, self.setting(*controls))}

    def pick(self, talk: Talk, event: gr.EventData) -> Change:
        """Keep the patches that were picked by hand of an image, or leave them to the method again.

        One that a later one has overtaken, or that was made on a picture which is not the present one, is left out.
        """
        if event.number > talk.picked and event.drawn == talk.drawn and 0 <= event.image < len(talk.pictures):
            picks = event.patches
            talk.pictures[event.image].picks = None if picks is None else tuple(tuple(map(int, tile)) for tile in picks)
        talk.note_pick(event.number)
        return {}

    def stop(self, talk: Talk, number: float = 0) -> Change:
        """Stop the answers up to a question at the next token; what is stopped says so itself."""
        talk.stop(int(number) or None)
        return {}

    def leave(self, talk: Talk, number: float) -> Change:
        """Stop what was asked before a question: a new conversation begins with it, as soon as the line allows."""
        talk.leaving = True
        talk.stop(int(number) - 1)
        return {}

    def forget(self, talk: Talk) -> Change:
        """Begin anew."""
        self.desk.leave(talk)
        talk.forget()
        return {"picture": "", "conversation": words.conversation([]), "status": "", "strip": ""}

    def ask(self, talk: Talk, question: str, *more: Any) -> Iterator[Change]:
        """Ask the next question; ``more``: controls, number of the question, and of the last pick before it."""
        setting = self._begin(talk, *more)
        yield from self._grow(talk, self.desk.ask(talk, question, setting), list(talk.exchanges))
        yield {"conversation": words.conversation(talk.exchanges), "status": words.status("answered")}

    def ask_again(self, talk: Talk, *more: Any) -> Iterator[Change]:
        """Ask the last question again under the present setting."""
        setting = self._begin(talk, *more)
        yield from self._grow(talk, self.desk.ask_again(talk, setting), talk.exchanges[:-1])
        yield {"conversation": words.conversation(talk.exchanges), "status": words.status("answered again")}

    def _begin(self, talk: Talk, *more: Any) -> Setting:
        *controls, number, picked = more
        talk.begin(int(number))
        talk.await_pick(int(picked))
        return self.setting(*controls)

    def _grow(self, talk: Talk, growing: Iterator[Any], before: list[Any]) -> Iterator[Change]:
        start = last = time.monotonic()
        yield {"conversation": words.conversation(before), "status": words.status("answering …", busy=True)}
        for exchange in growing:
            if (now := time.monotonic()) - last < _EVERY:
                continue
            last = now
            change = {"status": words.status(f"answering, {now - start:.0f} s …", busy=True)}
            yield change | ({"conversation": words.conversation([*before, exchange])} if exchange else {})

    def example(self, talk: Talk, example: Example, *controls: Any) -> Change:
        """Begin anew with an example's image and question."""
        cleared = self.forget(talk)
        talk.add([example.upload()])
        talk.pairs = example.view == "pairs"
        talk.hint = example.hint
        if talk.pairs and not self.desk.page_model.pairable:
            talk.hint = (
                "Figure 14 is not to be had of this model, whose encoder is read without it; this is its attention."
            )
        return cleared | {
            "picture": self._picture(talk, self.setting(*controls), example.view, example.layer),
            "status": words.status("reading …", busy=True),
        }

    def compare(self, talk: Talk, question: str, *more: Any) -> Iterator[Change]:
        """Ask one question about the shown image under each method."""
        setting = self._begin(talk, *more)
        if not talk.pictures:
            raise ValueError("there is no image or video to compare on: add one first")
        question = question.strip() or (talk.exchanges[-1].question if talk.exchanges else "")
        shown, rows = talk.pictures[talk.selected], []
        for row in self.desk.compare(talk, shown, question, setting.keep, list(METHODS)):
            if row is not None:
                rows.append(row)
            line = f"{len(rows)} of {len(METHODS) + 1} methods: {question}"
            busy = len(rows) <= len(METHODS)
            yield {"strip": pictures.strip(shown, rows), "status": words.status(line, busy=busy)}

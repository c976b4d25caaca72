"""Order on the page: requests that overtake each other, and messages that cannot."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from served_page import CONTROLS

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")

import gradio

from llava.demo.conversation.desk import Desk
from llava.demo.conversation.setting import Setting
from llava.demo.conversation.talk import StoppedError, Talk
from llava.demo.examples import EXAMPLES
from llava.demo.handlers import Handlers
from llava.demo.page import Page

RING, LETTERS = EXAMPLES[0], EXAMPLES[1]
IN_LINE = (True, "model", 1)  # queue, and gradio's line with a limit of one at a time


def test_stop_before_the_turn_comes_up(desk: Desk, talk: Talk):
    talk.begin()
    talk.stop()
    with pytest.raises(StoppedError):
        list(desk.ask(talk, RING.question, Setting(32)))
    assert not talk.exchanges and len(talk.waiting) == 1  # the image is still for the next question


def test_stop_overtakes_its_question(desk: Desk, talk: Talk):
    """The browser counts questions: Stop ends those up to a number, also one that the server has not heard of yet."""
    handlers = Handlers(desk)
    handlers.stop(talk, 3)
    for number in (1, 3):
        with pytest.raises(StoppedError):
            list(handlers.ask(talk, RING.question, *CONTROLS, number, 0))
    assert "answered" in list(handlers.ask(talk, RING.question, *CONTROLS, 4, 0))[-1]["status"]


def test_what_ends_the_conversation_before_does_not_stop_the_first_question_of_the_next(desk: Desk, talk: Talk):
    """However late it comes: it names the question with which the new conversation begins."""
    handlers = Handlers(desk)
    growing = handlers.ask(talk, RING.question, *CONTROLS, 1, 0)
    next(growing)
    handlers.leave(talk, 1)
    assert "answered" in list(growing)[-1]["status"]
    growing = handlers.ask(talk, RING.question, *CONTROLS, 2, 0)
    next(growing)
    handlers.leave(talk, 3)
    with pytest.raises(StoppedError):
        list(growing)


def picks(*patches: int, number: int, drawn: int) -> gradio.EventData:
    return gradio.EventData(None, {"image": 0, "patches": [list(patches)], "number": number, "drawn": drawn})


def test_a_question_waits_for_the_picks_before_it(desk: Desk, talk: Talk):
    handlers = Handlers(desk)
    list(handlers.ask(talk, RING.question, *CONTROLS, 1, 0))
    late = threading.Timer(0.2, handlers.pick, [talk, picks(3, 4, number=2, drawn=talk.drawn)])
    late.start()
    list(handlers.ask_again(talk, *CONTROLS, 2, 2))
    assert talk.exchanges[0].answers["zipped"].visual_tokens == 2


def test_picks_that_come_too_late_are_left_out(desk: Desk, talk: Talk):
    handlers, drawn = Handlers(desk), talk.drawn
    handlers.pick(talk, picks(5, number=2, drawn=drawn))
    handlers.pick(talk, picks(4, number=1, drawn=drawn))  # overtaken
    assert talk.pictures[0].picks == ((5,),)
    handlers.redraw(talk, *CONTROLS)  # another setting chooses anew
    handlers.pick(talk, picks(6, number=3, drawn=drawn))  # made on the picture before
    assert talk.pictures[0].picks is None
    handlers.forget(talk)
    talk.add([LETTERS.upload()])
    handlers.pick(talk, picks(7, number=4, drawn=drawn + 1))  # made on another conversation's
    assert talk.pictures[0].picks is None


def test_the_same_setting_said_twice_changes_nothing(desk: Desk, talk: Talk):
    """A slider says what it is set to more than once: patches that were picked in between stay, and the line too."""
    handlers = Handlers(desk)
    assert handlers.redraw(talk, *CONTROLS)["picture"]
    handlers.pick(talk, picks(5, number=1, drawn=talk.drawn))
    assert handlers.redraw(talk, *CONTROLS) == {} and talk.pictures[0].picks == ((5,),)
    assert handlers.redraw(talk, "uniform", *CONTROLS[1:])["picture"] and talk.pictures[0].picks is None


def test_no_message_can_come_in_the_wrong_order(desk: Desk):
    """What writes on the page goes through one line, or is the only one to write there; the rest writes nothing."""
    page = Page(desk, "a model")
    served = [event for event in page.blocks.fns.values() if event.fn is not None and not event.js]
    writers = Counter(component._id for event in served for component in set(event.outputs))
    by_line = [event for event in served if (event.queue, event.concurrency_id, event.concurrency_limit) == IN_LINE]
    assert {event.api_name for event in by_line} >= {"ask", "ask_again", "compare", "redraw", "forget", "add_images"}
    for event in served:
        if event not in by_line:
            assert all(writers[component._id] == 1 for component in event.outputs), event.api_name
            assert event.queue or not event.outputs, event.api_name

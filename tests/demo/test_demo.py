"""The page behind its components: conversations on one model."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from PIL import Image

from checkpoints import NEXT
from llava.model.builder import load_pretrained_model
from llava.serve.chat import ChatSession
from visionzip import unzip, visionzip
from visionzip.methods import METHODS

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")


from llava.demo.conversation import desk as desks
from llava.demo.conversation.desk import Desk
from llava.demo.conversation.setting import Setting
from llava.demo.conversation.talk import StoppedError, Talk
from llava.demo.conversation.visitors import MAX_VISITORS, Visitors
from llava.demo.drawing import pictures
from llava.demo.examples import EXAMPLES
from llava.demo.handlers import Handlers
from llava.demo.models.llava_model import LlavaModel

RING, LETTERS = EXAMPLES[0], EXAMPLES[1]


def ask(desk: Desk, talk: Talk, question: str, setting: Setting) -> dict[str, Any]:
    for _ in desk.ask(talk, question, setting):
        pass
    return talk.exchanges[-1].answers


def alone(model: tuple[Any, ...], images: list[Image.Image], *questions: str, keep: int) -> list[str]:
    """What a zipped session of its own answers."""
    tokenizer, llava, processor, conv_mode = model
    session = ChatSession(visionzip(llava, keep=keep), tokenizer, processor, conv_mode, max_new_tokens=12)
    return [session.ask(question, images if number == 0 else []).text for number, question in enumerate(questions)]


def test_both_sides_answer_the_same_conversation(desk: Desk, talk: Talk, model: tuple[Any, ...]):
    first = ask(desk, talk, RING.question, Setting(32))
    assert first["vanilla"].turn.text == first["zipped"].turn.text == "yellow"
    assert (first["vanilla"].visual_tokens, first["zipped"].visual_tokens) == (144, 32)
    second = ask(desk, talk, "Which shape is white?", Setting(32))
    assert second["vanilla"].turn.cached_tokens > 144 and 32 < second["zipped"].turn.cached_tokens < 144
    assert second["zipped"].visual_tokens == 32 and second["zipped"].turn.visual_tokens == 0
    texts = [exchange.answers["zipped"].turn.text for exchange in talk.exchanges]
    assert texts == alone(model, [RING.upload().open()], RING.question, "Which shape is white?", keep=32)


def test_another_setting_fills_the_zipped_cache_anew(desk: Desk, talk: Talk, model: tuple[Any, ...]):
    ask(desk, talk, RING.question, Setting(32))
    second = ask(desk, talk, "Which shape is white?", Setting(0.5, "uniform"))
    assert second["zipped"].turn.cached_tokens == 0 and second["zipped"].visual_tokens == 72
    assert second["vanilla"].turn.cached_tokens > 144
    third = ask(desk, talk, "How many objects are there?", Setting(0.5, "uniform"))
    assert third["zipped"].turn.cached_tokens > 72


def test_patches_picked_by_hand_are_what_the_model_sees(desk: Desk, talk: Talk):
    before = ask(desk, talk, RING.question, Setting(32))
    corner = tuple(row * 12 + column for row in range(3) for column in range(3, 7))  # plain background
    talk.pictures[0].picks = (corner,)
    for _ in desk.ask_again(talk, Setting(32)):
        pass
    (exchange,) = talk.exchanges
    assert exchange.answers["zipped"].visual_tokens == len(corner)
    assert exchange.answers["zipped"].turn.text != "yellow"
    assert exchange.setting == "visionzip, 32 tokens, patches picked by hand"
    assert exchange.answers["vanilla"] is before["vanilla"]  # nothing has changed for it
    assert desk.model.get_vision_tower().visionzip.tokens(144) == 32  # the setting is back
    data = desk.picture(talk.pictures[0], Setting(32))
    assert [patch for patch, role in enumerate(data["tiles"][0]["role"]) if role == "kept"] == sorted(corner)


def test_patches_picked_while_an_answer_comes_are_for_the_next_one(desk: Desk, talk: Talk):
    for exchange in desk.ask(talk, RING.question, Setting(32)):
        if exchange and exchange.partial.get("zipped"):
            talk.pictures[0].picks = ((0, 1, 2),)
    assert talk.exchanges[-1].answers["zipped"].visual_tokens == 32
    assert "by hand" not in talk.exchanges[-1].setting
    second = ask(desk, talk, "Which shape is white?", Setting(32))["zipped"]
    assert (second.visual_tokens, second.turn.cached_tokens) == (3, 0)  # not the cache of other patches


SETTINGS = [
    Setting(8),
    Setting(8, positions="original"),
    Setting(8, size_bias=True),
    Setting(8, "visionzip-plus"),
    Setting(8, "visionzip-plus", "consecutive", size_bias=False),
]


def test_positions_and_size_bias_reach_the_zipped_answer(desk: Desk, model: tuple[Any, ...]):
    """Each setting answers as a session of its own; and no two of them answer all the same."""
    tokenizer, llava, processor, conv_mode = model
    heard = []
    for setting in SETTINGS:
        answers = []
        for example in (RING, LETTERS, EXAMPLES[-1]):
            talk = Talk()
            talk.add([example.upload()])
            answers.append(ask(desk, talk, example.question, setting)["zipped"].turn.text)
            switches = {"positions": setting.positions, "size_bias": setting.size_bias}
            zipped = visionzip(unzip(llava), keep=setting.keep, method=setting.method, **switches)
            session = ChatSession(zipped, tokenizer, processor, conv_mode, max_new_tokens=12)
            assert answers[-1] == session.ask(example.question, [example.upload().open()]).text
        heard.append(tuple(answers))
    assert len(set(heard)) == len(SETTINGS)
    assert len(set(map(str, SETTINGS))) == len(SETTINGS)  # and the page says which is which


def test_the_models_own_setting_holds_but_for_the_controls(model: tuple[Any, ...]):
    """The page has no control for layer, merge rule and seed; the split is the model's at the model's budget."""
    with pytest.warns(UserWarning, match="layer -3"):
        visionzip(model[1], dominant=20, contextual=12, layer=-3, merge="average", seed=5)
    desk = Desk(LlavaModel(*model))
    own = desk.model.get_vision_tower().visionzip
    handlers = Handlers(desk)
    handlers.setting("visionzip", "tokens", 32).put_on(desk.model)
    assert desk.model.get_vision_tower().visionzip == own
    handlers.setting("random", "tokens", 16).put_on(desk.model)
    other = desk.model.get_vision_tower().visionzip
    assert (other.keep, other.layer, other.merge, other.seed) == (16, -3, "average", 5)


def test_each_image_has_its_own_picks(desk: Desk, talk: Talk):
    talk.add([LETTERS.upload()])
    talk.pictures[1].picks = ((0, 1, 2),)
    assert ask(desk, talk, LETTERS.question, Setting(32))["zipped"].visual_tokens == 32 + 3


def test_a_stopped_turn_leaves_the_conversation_as_it_was(desk: Desk, talk: Talk, model: tuple[Any, ...]):
    ask(desk, talk, RING.question, Setting(32))
    talk.begin()
    with pytest.raises(StoppedError):
        for exchange in desk.ask(talk, "Which shape is white?", Setting(32)):
            if "vanilla" in exchange.answers:  # this side has answered already
                talk.stop()
    assert [exchange.question for exchange in talk.exchanges] == [RING.question]
    talk.begin()
    answer = ask(desk, talk, "How many objects are there?", Setting(32))
    expected = alone(model, [RING.upload().open()], RING.question, "How many objects are there?", keep=32)
    assert answer["zipped"].turn.text == expected[-1]


def test_a_visitor_who_leaves_stops_the_model(desk: Desk, talk: Talk):
    desk.generate_kwargs |= {"min_new_tokens": 1500, "max_new_tokens": 1500}
    growing = desk.ask(talk, RING.question, Setting(32))
    next(growing)
    growing.close()
    other = Talk()
    other.add([RING.upload()])
    desk.generate_kwargs |= {"min_new_tokens": None, "max_new_tokens": 12}
    assert ask(desk, other, RING.question, Setting(32))["zipped"].turn.text == "yellow"
    assert not talk.exchanges


def test_old_conversations_give_their_caches_back(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(desks, "KEPT_CACHES", 1)
    talks = [Talk(), Talk()]
    for one in talks:
        one.add([RING.upload()])
        ask(desk, one, RING.question, Setting(32))
    assert not talks[0].sides and talks[1].sides
    again = ask(desk, talks[0], "Which shape is white?", Setting(32))
    assert again["vanilla"].turn.cached_tokens == 0 and again["vanilla"].turn.text == "square"


@pytest.mark.parametrize("family", ["llava-next", "mini-gemini"])
def test_other_families(family: str, load: Any, make_mgm: Any):
    loaded = load(**NEXT) if family == "llava-next" else load_pretrained_model(str(make_mgm()), device="cpu")
    desk = Desk(LlavaModel(*loaded[:3], "vicuna_v1"), max_new_tokens=3)
    talk = Talk()
    talk.add([RING.upload()])
    answer = ask(desk, talk, RING.question, Setting(5))
    tiles = desk.picture(talk.pictures[0], Setting(5))["tiles"]
    assert answer["zipped"].visual_tokens == 5 * len(tiles) < answer["vanilla"].visual_tokens
    talk.pictures[0].picks = ((0, 1),) * len(tiles)
    for _ in desk.ask_again(talk, Setting(5)):
        pass
    assert talk.exchanges[0].answers["zipped"].visual_tokens == 2 * len(tiles)


def test_errors_of_a_setting_leave_the_conversation_alone(desk: Desk, talk: Talk):
    with pytest.raises(ValueError, match="pool"):
        ask(desk, talk, RING.question, Setting(31, "pool"))  # no grid of 12 x 12 or less has 31 cells
    with pytest.raises(ValueError, match="the question is empty"):
        ask(desk, talk, "  ", Setting(32))
    assert not talk.exchanges
    assert ask(desk, talk, RING.question, Setting(32))["zipped"].turn.text == "yellow"


def test_compare_asks_every_method(desk: Desk, talk: Talk):
    rows = [row for row in desk.compare(talk, talk.pictures[0], RING.question, 31, list(METHODS)) if row]
    assert [row[0] for row in rows] == ["vanilla", *METHODS]
    by_name = {method: (data, answer) for method, data, answer in rows}
    assert by_name["vanilla"][1].visual_tokens == 144 and by_name["visionzip"][1].visual_tokens == 31
    assert by_name["visionzip"][1].turn.text == "yellow"
    assert by_name["pool"][0] is None and "31" in by_name["pool"][1]  # its line, beside the others' answers
    strip = pictures.strip(talk.pictures[0], rows)
    assert strip.count("<svg") == len(METHODS) and "31 visual tokens" in strip


def test_visitors_do_not_share_conversations_and_are_forgotten(desk: Desk):
    visitors = Visitors(desk)
    one, other = visitors.talk("one"), visitors.talk("other")
    one.add([RING.upload()])
    ask(desk, one, RING.question, Setting(32))
    assert not other.pictures and visitors.talk("one") is one
    image, sides = weakref.ref(one.pictures[0]), weakref.ref(one.sides["zipped"])
    visitors.leave("one")
    del one
    gc.collect()
    assert image() is None and sides() is None
    for number in range(MAX_VISITORS + 5):
        visitors.talk(str(number))
    assert len(visitors) == MAX_VISITORS
    with pytest.raises(ValueError, match="this conversation has ended"):  # it was idle longest
        visitors.talk("other")

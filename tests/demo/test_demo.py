"""The page behind its components: conversations on one model, uploads, and what the server refuses."""

from __future__ import annotations

import base64
import gc
import io
import json
import sys
import threading
import weakref
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image
from served_page import CONTROLS, MODEL, free_port, sent

from checkpoints import NEXT
from llava.arguments import load_from_arguments
from llava.cli import main
from llava.model.builder import load_pretrained_model
from llava.serve.chat import ChatSession
from visionzip import unzip, visionzip
from visionzip.methods import METHODS

gradio = pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")
httpx = pytest.importorskip("httpx")


from llava.demo import desk as desks  # noqa: E402
from llava.demo import show  # noqa: E402
from llava.demo.desk import Desk  # noqa: E402
from llava.demo.examples import EXAMPLES  # noqa: E402
from llava.demo.guard import names_file  # noqa: E402
from llava.demo.handlers import Handlers  # noqa: E402
from llava.demo.models import LlavaModel  # noqa: E402
from llava.demo.page import Page  # noqa: E402
from llava.demo.talk import Setting, StoppedError, Talk  # noqa: E402
from llava.demo.uploads import MAX_BYTES, MAX_IMAGES, Upload, read_uploads  # noqa: E402
from llava.demo.visitors import MAX_VISITORS, Visitors  # noqa: E402

RING, LETTERS = EXAMPLES[0], EXAMPLES[1]
IN_LINE = (True, "model", 1)  # queue, and gradio's line with a limit of one at a time


@pytest.fixture(scope="module")
def model() -> tuple[Any, ...]:
    given = {"model_path": str(MODEL), "model_base": None, "conv_mode": None, "device": "cpu"}
    return load_from_arguments(type("Args", (), given))


@pytest.fixture
def desk(model: tuple[Any, ...]) -> Desk:
    unzip(model[1])
    return Desk(LlavaModel(*model), do_sample=False, max_new_tokens=12)


@pytest.fixture
def talk() -> Talk:
    talk = Talk()
    talk.add([RING.upload()])
    return talk


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


def test_the_figure_of_misalignment(desk: Desk, talk: Talk):
    """Figure 14: what a patch attends to most is elsewhere and kept, as the example's hint says."""
    example = EXAMPLES[-1]
    data = json.loads(Handlers(desk).example(talk, example, *CONTROLS)["picture"])
    assert data["view"] == example.view == "pairs" and data["hint"] == example.hint
    (tile,) = data["data"]["tiles"]
    shares = torch.frombuffer(bytearray(base64.b64decode(tile["pairs"])), dtype=torch.uint8).view(144, 144)
    most = shares.argmax(dim=1)
    assert {tile["role"][patch] for patch in most} == {"kept"} and tile["role"].count("kept") == 26
    assert (most == torch.arange(144)).float().mean() < 0.05


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


def test_stop_before_the_turn_comes_up(desk: Desk, talk: Talk):
    talk.begin()
    talk.stop()
    with pytest.raises(StoppedError):
        ask(desk, talk, RING.question, Setting(32))
    assert not talk.exchanges and len(talk.waiting) == 1  # the image is still for the next question


def test_stop_overtakes_its_question(desk: Desk, talk: Talk):
    """The browser counts questions: Stop ends those up to a number, also one that the server has not heard of yet."""
    handlers = Handlers(desk)
    handlers.stop(talk, 3)
    for number in (1, 3):
        with pytest.raises(StoppedError):
            list(handlers.ask(talk, RING.question, *CONTROLS, number, 0))
    assert "answered" in list(handlers.ask(talk, RING.question, *CONTROLS, 4, 0))[-1]["status"]


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
    strip = show.strip(talk.pictures[0], rows)
    assert strip.count("<svg") == len(METHODS) and "31 visual tokens" in strip


def png(*size: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return file.getvalue()


def image_file(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_formats_of_browsers_and_cameras_are_opened(kind: str):
    (upload,) = read_uploads(sent((f"a.{kind.lower()}", image_file(kind))))
    assert upload.open().size == (8, 6)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (sent(("a.png", b"no image")), "a.png is not a readable image"),
        (sent(("a.png", png(8, 8)[:45])), "a.png is not a readable image"),
        (sent(("huge.png", png(9000, 9000))), "huge.png has 9000 x 9000 pixels, more than 40 million"),
        (sent(("fat.png", png(8, 8) + bytes(MAX_BYTES))), "fat.png has 10.0 MB, more than 10"),
        (sent(*[("a.png", png(8, 8))] * (MAX_IMAGES + 1)), "9 images are more than 8 in one conversation"),
        ('[{"name": "a.png", "data": "/etc/passwd"}]', "a.png came without base64 data"),
        ('[{"name": "a.png", "data": "http://127.0.0.1/a.png"}]', "a.png came without base64 data"),
        ('{"name": "a.png"}', "the upload is no list of images"),
        ("nonsense", "the upload is no list of images"),
        ("[" * 100_000, "the upload is no list of images"),
        (sent(("a.png", image_file("EPS"))), "a.png is of the format EPS, which is not opened here"),  # it is a program
    ],
)
def test_uploads_that_are_refused(text: str, problem: str):
    with pytest.raises(ValueError, match=problem) as raised:
        read_uploads(text)
    assert "\n" not in str(raised.value)


def test_total_of_a_conversation_is_limited():
    large = Upload("a.png", png(8, 8) + bytes(MAX_BYTES - 100))
    with pytest.raises(ValueError, match=r"images have 30\.0 MB, more than 24"):
        read_uploads(sent(("b.png", large.data)), [large, large])


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


def test_what_comes_from_outside_is_escaped(desk: Desk):
    talk = Talk()
    talk.add([Upload('"><script>x</script>', RING.upload().data)])
    ask(desk, talk, "<img src=x onerror=alert(1)>", Setting(8))
    page = show.conversation(talk.exchanges) + show.status("<b>", error=True)
    assert "<script" not in page and "<img src=x" not in page and "<b>" not in page


@pytest.mark.parametrize(
    ("controls", "problem"),
    [
        (("zip", "tokens", 32), "'zip' is unknown: use one of visionzip"),
        (("visionzip", "words", 32), "'words' is unknown"),
        (("visionzip", "tokens", 145), "a budget of 145 is outside 1 to 144 tokens"),
        (("visionzip", "percent", 0), "a budget of 0 is outside 1 to 100 percent"),
        (("visionzip", "tokens", None), "a budget of None is outside"),
        (("visionzip", "tokens", 32, "sideways"), "'sideways' is unknown"),
    ],
)
def test_controls_out_of_range(desk: Desk, controls: tuple[Any, ...], problem: str):
    with pytest.raises(ValueError, match=problem):
        Handlers(desk).setting(*controls)


def test_budget_in_tokens_or_percent(desk: Desk):
    assert Handlers(desk).setting("scope", "percent", 25).keep == 0.25
    assert Handlers(desk).setting("visionzip", "tokens", 32.0) == Setting(32)
    assert desk.default == Setting(32)  # 128 of 576, in this model's 144


def test_the_budget_is_kept_in_the_other_unit(desk: Desk, talk: Talk):
    slider = Handlers(desk).limits(talk, "percent", 36)["budget"]
    assert (slider.value, slider.maximum) == (25, 100)
    slider = Handlers(desk).limits(talk, "tokens", 25)["budget"]
    assert (slider.value, slider.maximum) == (36, 144)


def test_names_of_files_are_found_wherever_they_are():
    assert names_file(b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}')
    assert names_file(b'{"data": [1, [{"url": "http://a"}]]}') and names_file(b'{"data": [{"p\\u0061th": "x"}]}')
    assert not names_file(b'{"data": ["path", 3, null], "event_data": {"patches": [[1, 2]]}}') and not names_file(b"")
    assert names_file(b"[" * 100_000)  # too deep to be looked through


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, unread: None
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "llava.demo.page", raising=False)
    assert main(["demo"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.endswith('pip install "llava-visionzip[demo]"\n')


def test_a_taken_port_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture, unread: None):
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), BaseHTTPRequestHandler)
    with server:
        assert main(["demo", "--port", str(server.server_port)]) == 2
    assert "cannot be served on" in capsys.readouterr().err

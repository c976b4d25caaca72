"""Videos on the page: their frames are chosen, drawn and talked about as in ``visionzip chat --video``."""

from __future__ import annotations

import gc
import io
import re
import weakref
from pathlib import Path
from typing import Any

import av
import hf_video_models
import numpy as np
import pytest
from data_video import PIXELS
from served_page import CONTROLS, sent

from checkpoints import NEXT, encoded, picture
from llava.model.builder import load_pretrained_model
from llava.serve.chat import ChatSession
from llava.video import load_video
from visionzip import unzip, visionzip

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")

from llava.demo.conversation.desk import Desk
from llava.demo.conversation.setting import Setting
from llava.demo.conversation.talk import Talk
from llava.demo.conversation.visitors import Visitors
from llava.demo.drawing import pictures, words
from llava.demo.handlers import Handlers
from llava.demo.models.llava_model import LlavaModel
from llava.demo.page import Page
from llava.demo.uploads import videos
from llava.demo.uploads.videos import Clip, read_clips

GENERATE = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def clip_file(codec: str = "libx264", kind: str = "mp4", frames: int = 12, size: tuple[int, int] = (64, 48)) -> bytes:
    """A video of noise that moves."""
    file, width, height = io.BytesIO(), *size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, PIXELS[codec]
        for at in range(frames):
            frame = np.ascontiguousarray(np.roll(noise, 5 * at, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


FAMILIES = {  # tokens of eight frames: all, and with a setting of three
    "llava": (128, 24),
    "anyres": (None, 3 * 24),  # frames are images to it, of three tiles each
    "video-llava": (136, 24),
    "onevision": (33, 25),  # pooled; a newline behind the last frame
    "next_video": (32, 24),
    "video_llava": (136, 24),
}


@pytest.fixture(scope="module", params=FAMILIES)
def page_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaModel:
    name = request.param
    if name == "video-llava":
        folder = request.getfixturevalue("make_video_checkpoint")()
    elif name in hf_video_models.FAMILIES:
        folder = hf_video_models.save(name, tmp_path_factory.mktemp("page") / name)
    else:
        folder = request.getfixturevalue("make_checkpoint")(**(NEXT if name == "anyres" else {}))
    return LlavaModel(*load_pretrained_model(str(folder), device="cpu")[:3], "vicuna_v1")


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["page_model"]


@pytest.fixture
def video_desk(page_model: LlavaModel) -> Desk:
    unzip(page_model.model)
    return Desk(page_model, **GENERATE)


@pytest.fixture
def clip() -> Clip:
    return read_clips(sent(("clip.mp4", clip_file())), 8)[0]


@pytest.fixture
def film(clip: Clip) -> Talk:
    talk = Talk()
    talk.add([clip])
    return talk


def test_both_sides_answer_as_chat_does(video_desk: Desk, film: Talk, family: str, tmp_path: Path):
    """About the frames that ``chat --video`` opens, with the tokens that it says, and a kept cache in the next turn."""
    questions, setting = ["What is it?", "Why?"], Setting(3)
    for question in questions:
        list(video_desk.ask(film, question, setting))
    first, second = (exchange.answers for exchange in film.exchanges)
    vanilla, zipped = FAMILIES[family]
    assert vanilla is None or first["vanilla"].visual_tokens == vanilla
    assert first["zipped"].visual_tokens == second["zipped"].visual_tokens == zipped
    assert second["vanilla"].turn.cached_tokens > second["zipped"].turn.cached_tokens > zipped
    assert f"<dt>per frame</dt><dd>{zipped // 8} " in words.conversation(film.exchanges)
    (tmp_path / "clip.mp4").write_bytes(clip_file())
    page_model = video_desk.page_model
    for slot, prepare in (("vanilla", unzip), ("zipped", lambda model: visionzip(model, keep=3))):
        session = ChatSession(
            prepare(unzip(page_model.model)), page_model.tokenizer, page_model.image_processor, **GENERATE
        )
        frames = load_video(tmp_path / "clip.mp4")
        texts = [session.ask(question, [frames] if turn == 0 else []).text for turn, question in enumerate(questions)]
        assert texts == [answers[slot].turn.text for answers in (first, second)]


def test_each_frame_is_drawn(video_desk: Desk, film: Talk, family: str):
    data = video_desk.picture(film.pictures[0], Setting(3))
    assert (data["frames"], len(data["tiles"]), data["size"]) == (8, 8, [64, 48])
    assert (data["pickable"], data["pairable"]) == (False, family in ("llava", "anyres"))
    assert data["tokens"][1] == FAMILIES[family][1] - (family == "onevision")
    kept = [[at for at, role in enumerate(tile["role"]) if role in ("kept", "target")] for tile in data["tiles"]]
    assert {len(own) for own in kept} == {3 - data["keeps_cls"]}
    assert len({str(own) for own in kept}) > 1  # what moves is kept elsewhere
    assert len(data["tiles"][0]["attention"]) == data["layers"] and len(data["tiles"][0]["rects"]) == data["patches"]


def test_all_methods_on_a_video(video_desk: Desk, film: Talk):
    rows = [row for row in video_desk.compare(film, film.pictures[0], "What?", 0.5, ["visionzip", "uniform"]) if row]
    strip = pictures.strip(film.pictures[0], rows)
    assert strip.count("<svg") == 3 * 8 and strip.count("<image") == strip.count("data:image") == 8  # pixels come once
    assert strip.count("<use") == 2 * 8 and strip.count('aria-label="frame 8: ') == 3


def test_the_controls_and_what_they_say(desk: Desk):
    page, handlers, talk = Page(desk, "a model"), Handlers(desk), Talk()
    assert "clips" in page.parts and page.parts["frames"].value == 8
    change = handlers.add_videos(talk, sent(("clip.webm", clip_file("libvpx-vp9", "webm"))), 12, *CONTROLS)
    assert "12 frames of clip.webm for the next question" in change["status"] and change["clips"] == ""
    assert '"frames": 12' in change["picture"] and len(talk.waiting[0].upload.open()) == 12


def test_what_is_too_long_for_all_tokens_is_answered_with_fewer(desk: Desk):
    """The context of 2048 tokens has no room for 16 frames of 144: that side says so, and does in later turns."""
    talk = Talk()
    talk.add(read_clips(sent(("clip.mp4", clip_file(frames=16))), 16))
    for question in ("What is it?", "Why?"):
        list(desk.ask(talk, question, Setting(32)))
    assert [set(exchange.answers) for exchange in talk.exchanges] == [{"zipped"}] * 2
    shown = words.conversation(talk.exchanges)
    assert shown.count("tokens but the model&#x27;s context is 2048") == 2
    assert talk.exchanges[1].answers["zipped"].turn.cached_tokens > 512
    list(desk.ask_again(talk, Setting(16)))
    assert talk.exchanges[1].answers["zipped"].visual_tokens == 256 and "vanilla" in talk.exchanges[1].refused
    with pytest.raises(ValueError, match="the model's context is 2048"):  # for both
        list(desk.ask(talk, "And now?", Setting(144)))
    assert len(talk.exchanges) == 2


@pytest.mark.parametrize(("codec", "kind"), [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("gif", "gif")])
def test_frames_are_those_of_chat(codec: str, kind: str, tmp_path: Path):
    file = tmp_path / f"clip.{kind}"
    file.write_bytes(clip_file(codec, kind))
    for asked in (8, 5):
        (found,) = read_clips(sent((file.name, file.read_bytes())), asked)
        expected = load_video(file, None if asked == 8 else asked)
        assert [np.asarray(frame).tolist() for frame in found.open()] == [
            np.asarray(each).tolist() for each in expected
        ]
    assert len(found.shown) == 5 and found.thumbnail.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("text", "frames", "problem"),
    [
        (sent(("a.mp4", clip_file()[:600])), 8, "a.mp4 "),  # damaged
        (sent(("a.mp4", b"\0\0\0\x18ftypisom")), 8, "a.mp4 has no video stream|a.mp4 cannot be read as a video"),
        (sent(("a.mp4", b"no video")), 8, "a.mp4 is no video of the formats MP4, WebM and GIF"),
        (sent(("a.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")), 8, "a.m3u8 is no video of the formats"),
        (sent(("a.mp4", bytes(videos.MAX_BYTES + 1))), 8, r"a.mp4 has 20\.0 MB, more than 20: cut it"),
        (sent(("a.mp4", clip_file(frames=3))), 4, "a.mp4 has only 3 frames, but 4 were asked for"),
        (sent(("a.mp4", clip_file())), 33, "33 frames of each video are outside 1 to 32"),
        (sent(("a.mp4", clip_file())), None, "None frames of each video are outside 1 to 32"),
        (sent(("a.gif", clip_file("gif", "gif", 1, (2000, 1100)))), 8, r"2000 x 1100 pixels, more than 2\.1 million"),
        ('[{"name": "a.mp4", "data": "/etc/passwd"}]', 8, "a.mp4 came without base64 data"),
        (sent(*[("a.mp4", b"x")] * 9), 8, "9 images or videos are more than 8 in one conversation"),
    ],
)
def test_videos_that_are_refused(text: str, frames: Any, problem: str):
    with pytest.raises(ValueError, match=problem) as raised:
        read_clips(text, frames)
    assert "\n" not in str(raised.value)


def test_what_would_take_long_is_not_decoded(monkeypatch: pytest.MonkeyPatch, clip: Clip):
    text = sent(("a.mp4", clip_file()))
    monkeypatch.setattr(videos, "MAX_SECONDS", 1)
    with pytest.raises(ValueError, match=r"a\.mp4 lasts 1 s, more than 1: cut it"):
        read_clips(text, 8)
    monkeypatch.setattr(videos, "MAX_SECONDS", 60)
    for limit, most in (("frames", 11), ("pixels", 11)):
        monkeypatch.setitem(videos._OPENED, limit, most * (64 * 48 if limit == "pixels" else 1))
        with pytest.raises(ValueError, match=r"a\.mp4 has more than 11 frames of 64 x 48 pixels: cut it"):
            read_clips(text, 8)
        monkeypatch.setitem(videos._OPENED, limit, 10**9)
    monkeypatch.setattr(videos, "MAX_PIXELS", 2 * 8 * 64 * 48 - 1)
    with pytest.raises(ValueError, match="frames of the conversation's videos have 0 million pixels, more than"):
        read_clips(text, 8, [clip])
    assert read_clips(text, 7, [clip])


def test_a_visit_with_an_image_beside_the_video(desk: Desk, film: Talk):
    """The figures are of all then; a frame has none of its own."""
    handlers = Handlers(desk)
    handlers.add_images(film, sent(("a.png", encoded(picture(0)))), *CONTROLS)
    list(handlers.ask(film, "What is it?", *CONTROLS, 1, 0))
    shown = words.conversation(film.exchanges)
    assert "per frame" not in shown and re.findall(r"visual tokens</dt><dd>(\d+)", shown) == ["1296", "288"]


def test_a_visitors_video_is_that_visitors_and_goes_with_it(desk: Desk):
    visitors, handlers = Visitors(desk), Handlers(desk)
    one, other = visitors.talk("one"), visitors.talk("other")
    handlers.add_videos(one, sent(("clip.mp4", clip_file())), 2, *CONTROLS)
    list(handlers.ask(one, "What is it?", *CONTROLS, 1, 0))
    assert not other.pictures and handlers.add_videos(other, "", 8, *CONTROLS) == {}
    clip = weakref.ref(one.pictures[0].upload)
    visitors.leave("one")
    del one
    gc.collect()
    assert clip() is None

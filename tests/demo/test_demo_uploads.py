"""What comes from a visitor's browser: image files, and words that are not to be markup."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from served_page import sent

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")


from llava.demo.conversation.desk import Desk
from llava.demo.conversation.setting import Setting
from llava.demo.conversation.talk import Talk
from llava.demo.drawing import words
from llava.demo.examples import EXAMPLES
from llava.demo.guard import names_file
from llava.demo.uploads.images import MAX_BYTES, MAX_IMAGES, Upload, read_uploads

RING = EXAMPLES[0]


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
        (sent(*[("a.png", png(8, 8))] * (MAX_IMAGES + 1)), "9 images or videos are more than 8 in one conversation"),
        ('[{"name": "a.png", "data": "/etc/passwd"}]', "a.png came without base64 data"),
        ('[{"name": "a.png", "data": "http://127.0.0.1/a.png"}]', "a.png came without base64 data"),
        ('{"name": "a.png"}', "the upload is no list of files"),
        ("nonsense", "the upload is no list of files"),
        ("[" * 100_000, "the upload is no list of files"),
        (sent(("a.png", image_file("EPS"))), "a.png is of the format EPS, which is not opened here"),  # it is a program
    ],
)
def test_uploads_that_are_refused(text: str, problem: str):
    with pytest.raises(ValueError, match=problem) as raised:
        read_uploads(text)
    assert "\n" not in str(raised.value)


def test_total_of_a_conversation_is_limited():
    large = Upload("a.png", png(8, 8) + bytes(MAX_BYTES - 100))
    with pytest.raises(ValueError, match=r"files have 30\.0 MB, more than 24"):
        read_uploads(sent(("b.png", large.data)), [large, large])


def test_what_comes_from_outside_is_escaped(desk: Desk):
    talk = Talk()
    talk.add([Upload('"><script>x</script>', RING.upload().data)])
    list(desk.ask(talk, "<img src=x onerror=alert(1)>", Setting(8)))
    page = words.conversation(talk.exchanges) + words.status("<b>", error=True)
    assert "<script" not in page and "<img src=x" not in page and "<b>" not in page


def test_names_of_files_are_found_wherever_they_are():
    assert names_file(b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}')
    assert names_file(b'{"data": [1, [{"url": "http://a"}]]}') and names_file(b'{"data": [{"p\\u0061th": "x"}]}')
    assert not names_file(b'{"data": ["path", 3, null], "event_data": {"patches": [[1, 2]]}}') and not names_file(b"")
    assert names_file(b"[" * 100_000)  # too deep to be looked through

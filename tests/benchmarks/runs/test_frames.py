"""Frames of videos: which, from what files, and what is said about bad ones."""

from __future__ import annotations

import io
import zipfile
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from data_video import write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval.reading.frames import clip, frames_of, videos_below, with_frames
from eval.records import Question, Visual
from llava.video import _count_packets, _decode, _opened, read_frames

SPREAD = {12: [0, 1, 3, 4, 6, 7, 9, 11], 8: [0, 1, 2, 3, 4, 5, 6, 7], 3: [0, 0, 0, 0, 1, 1, 1, 2], 1: [0] * 8}


def grays(frames: int) -> list[int]:
    return [10 + 20 * index for index in range(frames)]


def shown(images: list[Image.Image]) -> list[int]:
    """Which frames they are, by their gray."""
    return [round((np.asarray(image).mean() - 10) / 20) for image in images]


def video(frames: int, codec: str = "gif", kind: str = "gif", **options: object) -> bytes:
    file = io.BytesIO()
    write_video(file, codec, grays(frames), format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("frames", SPREAD)
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", "mp4"),
        ("mpeg4", "avi"),
        ("mjpeg", "mov"),
        ("libx264", "mkv"),
        ("libvpx-vp9", "webm"),
        ("gif", "gif"),
    ],
)
def test_eight_evenly_spaced_frames(tmp_path: Path, codec: str, suffix: str, frames: int):
    """mkv and webm do not say how many they have."""
    path = tmp_path / f"some %d: video.{suffix}"  # ffmpeg would take the name for a pattern
    write_video(str(tmp_path / f"a.{suffix}"), codec, grays(frames))
    (tmp_path / f"a.{suffix}").rename(path)
    images = read_frames(path, "video")
    assert shown(images) == SPREAD[frames]
    assert {(image.size, image.mode) for image in images} == {((48, 32), "RGB")}
    assert shown(read_frames(path.read_bytes(), "video")) == SPREAD[frames]


@given(st.integers(1, 12), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_any_number_of_frames(frames: int, count: int):
    """The first always, the last unless one is asked for, in order, at most one apart from even."""
    found = shown(read_frames(video(frames), "video", count))
    assert len(found) == count
    assert found == sorted(found)
    assert found[0] == 0
    assert count == 1 or found[-1] == frames - 1
    assert all(abs(index - place * (frames - 1) / max(count - 1, 1)) < 1 for place, index in enumerate(found))


def test_frames_count_not_their_time(tmp_path: Path):
    """Variable frame rate: the first two frames take as long as the other ten."""
    path = tmp_path / "a.mkv"
    write_video(str(path), "libx264", grays(12), times=[0, 40, *range(80, 90)])
    assert shown(read_frames(path, "a")) == SPREAD[12]


def test_frames_are_upright(tmp_path: Path):
    """Held upright, a phone films lying frames and notes a quarter turn clockwise: their left is up."""
    path = tmp_path / "phone.mp4"
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(-90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")) + stream.encode())
    (image,) = read_frames(path, "video", 1)
    assert image.size == (32, 48)
    upper, lower = np.split(np.asarray(image), 2)
    assert upper.mean() > 200 and lower.mean() < 50


def test_only_wanted_frames_are_kept():
    frames, total = _decode(partial(_opened, video(12), "video", None), [3, 11, 3], "AUTO")
    assert total == 12
    assert sorted(frames) == [3, 11]


def test_packets_that_lead_to_no_frame():
    """Those before the time 0, that the file says to leave out."""
    content = video(12, "libx264", "mp4", times=list(range(-4, 8)))
    assert _count_packets(partial(_opened, content, "video", None), "video", None) == 12
    assert shown(read_frames(content, "video")) == [4, 5, 6, 7, 8, 9, 10, 11]


def test_a_damaged_packet(tmp_path: Path):
    """Not passed over, as ffmpeg's threads would."""
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read as a video"):
        clip(path).open()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.rate = 8000
        container.mux(stream.encode(frame))
    return file.getvalue()


def song() -> bytes:
    """A cover is a video stream to ffmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp3") as container:
        audio = container.add_stream("libmp3lame", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 48, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture) + cover.encode())
        frame = av.AudioFrame(format="s16p", layout="mono", samples=1152)
        frame.rate = 16000
        container.mux(audio.encode(frame) + audio.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.mp4 cannot be read as a video"),
        (b"<html>404</html>" * 100, "x.mp4 cannot be read as a video"),
        (bytes(10_000), "x.mp4 cannot be read as a video"),
        (video(12, "libx264", "mp4")[:-300], "x.mp4 cannot be read as a video"),
        (video(12, "libx264", "matroska")[:700], "x.mp4 has no frames"),
        (sound(), "x.mp4 has no video stream"),
        (song(), "x.mp4 has no video stream"),
    ],
    ids=["empty", "a web page", "zeros", "mp4 without its end", "only a header", "sound", "a song with its cover"],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        clip(path).open()
    assert str(path) in str(raised.value)


def test_a_clip_is_read_when_it_is_opened(tmp_path: Path):
    path = tmp_path / "a.gif"
    (question,) = with_frames([Question(1, "what?", (clip(path),))], 5)
    (visual,) = question.visuals
    assert (visual.key, visual.frames, visual.path) == (str(path), 5, path)
    with pytest.raises(FileNotFoundError, match=f"there is no video {path}"):
        visual.open()
    path.write_bytes(video(5))
    assert shown(visual.open()) == [0, 1, 2, 3, 4]


def test_videos_by_name(tmp_path: Path):
    """In subfolders and archives; mp4 before others; hidden copies of macOS and other files are none."""
    (tmp_path / "all").mkdir()
    for name in ("one.gif", "one.mp4", "all/two.MKV", "all/._three.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(video(3))
    with zipfile.ZipFile(tmp_path / "more.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("all/four.mp4", video(8))
        archive.writestr("__MACOSX/all/._four.mp4", b"")
    found = videos_below(tmp_path)
    assert sorted(found) == ["four", "four.mp4", "one", "one.gif", "one.mp4", "two", "two.MKV"]
    assert found["one"].path == tmp_path / "one.mp4"
    assert found["one.gif"].path == tmp_path / "one.gif"
    assert found["four"].key == f"{tmp_path}/more.zip/all/four.mp4"
    assert found["four"].path is None
    assert shown(found["four"].open()) == SPREAD[8]
    assert shown(found["two"].open()) == SPREAD[3]


def test_bad_archives(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*videos"):
        videos_below(tmp_path / "videos")
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.mp4", video(3))
    damaged = bytearray(path.read_bytes())
    damaged[100:110] = bytes(10)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.mp4 in .*a\.zip is damaged"):
        videos_below(tmp_path)["a"].open()
    path.write_bytes(damaged[:-20])
    with pytest.raises(ValueError, match=r"a\.zip is damaged"):
        videos_below(tmp_path)


def test_frames_of_questions():
    """Another number of them again and again, one of them too; images stay, and none without videos."""
    image = Visual("image.png", lambda: [Image.new("RGB", (8, 8))])
    questions = [Question(1, "one", (image,)), Question(2, "two", (image, clip(Path("a.gif"))))]
    assert frames_of(questions) == 8 and frames_of(questions[:1]) is None
    for count in (120, 1):
        questions = with_frames(questions, count)
        assert frames_of(questions) == count and questions[1].visuals[0] is image
    with pytest.raises(ValueError, match="--frames 5: this benchmark has no videos"):
        with_frames(questions[:1], 5)

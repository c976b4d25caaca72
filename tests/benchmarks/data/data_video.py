"""Tiny video benchmarks, as Video-LLaVA's folders and as parquet: four questions each, about three videos.

The videos are real ones; their frame i is gray, 10 + 20 i.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PIXELS = {"libx264": "yuv420p", "mpeg4": "yuv420p", "libvpx-vp9": "yuv420p", "mjpeg": "yuvj420p", "gif": "rgb8"}


@dataclass(frozen=True)
class Data:
    """A benchmark's: folder and videos' folder in it, files by video, and (id, video, question, answer, type)."""

    folder: str
    videos: str
    files: dict[str, tuple[str, str, int]]  # by video: file name, codec, number of frames
    rows: list[tuple[Any, str, str, str, int]]


DATA = {
    "tgif": Data(
        "TGIF_Zero_Shot_QA",
        "mp4",
        {
            "tumblr_no73q2fm0I1uuf348o1_250": ("tumblr_no73q2fm0I1uuf348o1_250.mp4", "libx264", 12),
            "tumblr_nedt1ck9181ttuja3o1_250": ("tumblr_nedt1ck9181ttuja3o1_250.gif", "gif", 3),
            "tumblr_nkn62ijxc71sk927ro1_400": ("tumblr_nkn62ijxc71sk927ro1_400.mp4", "mpeg4", 1),
        },
        [
            ("FRAMEQA1159", "tumblr_no73q2fm0I1uuf348o1_250", "what is in the white ice cream cone?", "cookie", 0),
            ("FRAMEQA26835", "tumblr_no73q2fm0I1uuf348o1_250", "how many people are sitting?", "two", 1),
            ("FRAMEQA4460", "tumblr_nedt1ck9181ttuja3o1_250", "what is the color of the shirt?", "black", 2),
            ("FRAMEQA9405", "tumblr_nkn62ijxc71sk927ro1_400", "where is the guy walking?", "machine", 3),
        ],
    ),
    "msvd": Data(
        "MSVD_Zero_Shot_QA",
        "videos",
        {
            "bQJQGoJF7_k_162_169": ("bQJQGoJF7_k_162_169.avi", "mpeg4", 12),
            "bSrpvMSuhPM_17_31": ("bSrpvMSuhPM_17_31.avi", "mpeg4", 9),
            "bXsKw3TOQXs_30_55": ("bXsKw3TOQXs_30_55.avi", "mpeg4", 2),
        },
        [
            ("1201_30934", "bQJQGoJF7_k_162_169", "who pours sauce into a bag?", "man", 0),
            ("1201_30942", "bQJQGoJF7_k_162_169", "who is pouring sauce into a bag of meat?", "person", 0),
            ("1203_30984", "bSrpvMSuhPM_17_31", "who made a plea with the man?", "lady", 0),
            ("1204_30996", "bXsKw3TOQXs_30_55", "who folded a piece of square green paper?", "someone", 0),
        ],
    ),
    "msrvtt": Data(
        "MSRVTT_Zero_Shot_QA",
        "videos/all",
        {
            "video6513": ("video6513.mp4", "libx264", 12),
            "video6514": ("video6514.mp4", "mpeg4", 5),
            "video6515": ("video6515.mp4", "libx264", 10),
        },
        [
            (158581, "video6513", "what are three people sitting on?", "couch", 14),
            (158583, "video6513", "what plays?", "music", 14),
            (158611, "video6514", "who is dirt biking?", "guy", 3),
            (158626, "video6515", "what does a man cut?", "pepper", 17),
        ],
    ),
    "activitynet": Data(
        "Activitynet_Zero_Shot_QA",
        "all_test",
        {
            "1QIUV7WYKXg": ("v_1QIUV7WYKXg.mp4", "libx264", 12),
            "-vY2uUmv6Dk": ("v_-vY2uUmv6Dk.mkv", "libx264", 8),
            "9eniCub7u60": ("v_9eniCub7u60.mp4", "mpeg4", 11),
        },
        [
            ("v_1QIUV7WYKXg_3", "1QIUV7WYKXg", "is the athlete wearing trousers", "no", 3),
            ("v_-vY2uUmv6Dk_2", "-vY2uUmv6Dk", "does the person in green have short hair", "yes", 3),
            ("v_-vY2uUmv6Dk_9", "-vY2uUmv6Dk", "what is the person in green doing ", "curling", 0),
            ("v_9eniCub7u60_2", "9eniCub7u60", "does the girl in black clothes have long hair", "yes", 3),
        ],
    ),
}


def write_video(
    file: str | BinaryIO, codec: str, grays: list[int], times: list[int] | None = None, **options: Any
) -> None:
    """A video of 48 x 32 pixels, a frame for each gray; times are in tenths of a second."""
    with av.open(file, "w", **options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, PIXELS[codec]
        for index, gray in enumerate(grays):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), gray, np.uint8), format="rgb24")
            frame.pts, frame.time_base = (times[index] if times else index), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def video_of(data: Data, video: str) -> bytes:
    name, codec, frames = data.files[video]
    kind = {".mp4": "mp4", ".avi": "avi", ".mkv": "matroska", ".gif": "gif"}[Path(name).suffix]
    file = io.BytesIO()
    write_video(file, codec, [10 + 20 * index for index in range(frames)], format=kind)
    return file.getvalue()


def write_folder(root: Path, name: str) -> Path:
    """Video-LLaVA's folder of a benchmark below a data root; returns it."""
    data = DATA[name]
    folder = root / "GPT_Zero_Shot_QA" / data.folder
    (folder / data.videos).mkdir(parents=True)
    for video, (file, *_) in data.files.items():
        (folder / data.videos / file).write_bytes(video_of(data, video))
    asked = [{"video_name": row[1], "question": row[2], "question_id": row[0]} for row in data.rows]
    answers = [{"answer": row[3], "type": row[4], "question_id": row[0]} for row in data.rows]
    (folder / "test_q.json").write_text(json.dumps(asked))
    (folder / "test_a.json").write_text(json.dumps(answers))
    return folder


def write_tables(root: Path, name: str) -> None:
    """ActivityNet as on the hub, videos in an archive; the others in the columns of IG-VLM's csv files.

    The videos of TGIF lie beside; MSVD has them in the table, MSRVTT their paths.
    """
    data = DATA[name]
    (root / "data").mkdir(parents=True)
    ids, videos, questions, answers, types = (list(column) for column in zip(*data.rows, strict=True))
    columns: dict[str, Any] = {"video_name": videos, "question": questions, "answer": answers}
    if name == "activitynet":
        columns |= {"question_id": ids, "type": [str(kind) for kind in types]}
        with zipfile.ZipFile(root / "videos_chunked_01.zip", "w") as archive:
            for video, (file, *_) in data.files.items():
                archive.writestr(f"all_test/{file}", video_of(data, video))
    else:
        columns |= {"Unnamed: 0": list(range(1, 5)), "video_id": videos, "question_id": ids, "question_type": types}
    if name == "tgif":  # question_id is that of the GIF there
        columns |= {"video_id": ids, "question_id": [27138, 27138, 87751, 2853]}
    if name == "msvd":
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns["video"] = pa.array([{"bytes": video_of(data, video), "path": None} for video in videos], struct)
    elif name in ("tgif", "msrvtt"):
        (root / "videos").mkdir()
        for video, (file, *_) in data.files.items():
            (root / "videos" / file).write_bytes(video_of(data, video))
    if name == "msrvtt":
        columns["video"] = [f"videos/{video}.mp4" for video in videos]
    pq.write_table(pa.table(columns), root / "data" / "test-00000-of-00001.parquet")


def expected(texts: list[str], name: str) -> float:
    """Accuracy by ``--judge exact``: the answer, a word, is one of the text's."""
    words = [re.findall(r"[^\W_]+", re.sub("['\u2019]", "", text.lower())) for text in texts]
    return 100 * sum(row[3] in said for row, said in zip(DATA[name].rows, words, strict=True)) / 4

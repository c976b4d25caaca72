"""SEED-Bench in its real formats, small: LLaVA's folder and the hub's parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

TYPES = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}

# As in SEED-Bench.json, where ids are strings; two images (one with a name without an ending) and a video.
QUESTIONS: list[dict[str, Any]] = [
    {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    },
    {
        "answer": "C",
        "choice_a": "A desert",
        "choice_b": "A street",
        "choice_c": "A kitchen",
        "choice_d": "A beach",
        "data_id": "2146404_1001",
        "data_type": "image",
        "question": "What is the overall scene?",
        "question_id": "23000",
        "question_type_id": 1,
    },
    {
        "answer": "D",
        "choice_a": "Push",
        "choice_b": "Pull",
        "choice_c": "Lift",
        "choice_d": "Drop",
        "data_id": "20.webm",
        "data_type": "video",
        "question": "What is done in the video?",
        "question_id": "v0",
        "question_type_id": 10,
        "segment": [0.0, 2.5],
    },
]
_NAMES = {number: name for name, number in TYPES.items()}


def image_bytes(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (18, 22), (shade, 120, 30)).save(file, "png")
    return file.getvalue()


def write_truth(folder: Path) -> None:
    """What the official scorer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SEED-Bench.json").write_text(json.dumps({"question_type": TYPES, "questions": QUESTIONS}))


def write_folder(root: Path) -> None:
    folder = root / "seed_bench"
    write_truth(folder)
    lines = []
    for number, row in enumerate(QUESTIONS):
        is_image = row["data_type"] == "image"
        image = (
            f"SEED-Bench-image/{row['data_id']}"
            if is_image
            else f"SEED-Bench-video-image/{row['question_type_id']}_{row['question_id']}.png"
        )
        (folder / image).parent.mkdir(exist_ok=True)
        (folder / image).write_bytes(image_bytes(number * 80))
        text = (
            f"{row['question']}\nA. {row['choice_a']}\nB. {row['choice_b']}\nC. {row['choice_c']}\n"
            f"D. {row['choice_d']}\nAnswer with the option's letter from the given choices directly."
        )
        name = int(row["question_id"]) if is_image else row["question_id"]
        category = _NAMES[row["question_type_id"]]
        lines.append(json.dumps({"image": image, "text": text, "category": category, "question_id": name}))
    (folder / "llava-seed-bench.jsonl").write_text("\n".join(lines) + "\n")


def write_tables(root: Path) -> None:
    """Split ``test``; an image is a list of one, a video of eight frames."""
    columns = [column for column in QUESTIONS[0] if column != "question_type_id"]
    features = datasets.Features(
        {
            **{column: datasets.Value("string") for column in columns},
            "question_type_id": datasets.Value("int64"),
            "image": datasets.List(datasets.Image()),
            "segment": datasets.List(datasets.Value("float64")),
        }
    )
    records = []
    for number, row in enumerate(QUESTIONS):
        frames = 1 if row["data_type"] == "image" else 8
        image = [{"bytes": image_bytes(number * 80 + frame), "path": None} for frame in range(frames)]
        records.append({**row, "segment": row.get("segment"), "image": image})
    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(records, features=features).to_parquet(folder / "test-00000-of-00001.parquet")


def expected(texts: list[str]) -> float:
    """100 times the share of texts that are the right letter; three are the folder's, two the hub's (images only)."""
    return 100 * sum(text == letter for text, letter in zip(texts, "ACD", strict=False)) / len(texts)

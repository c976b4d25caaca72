"""A tiny POPE, as LLaVA's folder and as a copy of lmms-lab/POPE: eight questions about two images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
FIRST, SECOND = "COCO_val2014_000000310196", "COCO_val2014_000000210789"
# LLaVA's id, category, image, question (the labels' own spelling), label
ROWS = [
    (1, "adversarial", FIRST, "Is there a snowboard in the image?", "yes"),
    (2, "adversarial", FIRST, "Is there a backpack in the image?", "no"),
    (3, "adversarial", SECOND, "Is there an umbrella in the imange?", "no"),
    (20000001, "popular", FIRST, "Is there a snowboard in the image?", "yes"),
    (20000002, "popular", FIRST, "Is there a dining table in the image?", "no"),
    (10000001, "random", FIRST, "Is there a snowboard in the image?", "yes"),
    (10000002, "random", SECOND, "Is there a bed in the image?", "no"),
    (10000003, "random", SECOND, "Is there a person in the image?", "yes"),
]
CATEGORIES = ("adversarial", "popular", "random")


def image(name: str) -> bytes:
    """A jpeg, of another colour for each name."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 40, 40) if name == FIRST else (30, 60, 210)).save(file, "JPEG")
    return file.getvalue()


def write_folder(root: Path) -> None:
    folder = root / "pope"
    (folder / "coco").mkdir(parents=True)
    (folder / "val2014").mkdir()
    for name in (FIRST, SECOND):
        (folder / "val2014" / f"{name}.jpg").write_bytes(image(name))
    questions = [
        {"question_id": number, "image": f"{name}.jpg", "text": text + SHORT, "category": category}
        for number, category, name, text, _ in ROWS
    ]
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for category in CATEGORIES:
        own = [row for row in ROWS if row[1] == category]
        labels = [
            {"question_id": number, "image": f"{name}.jpg", "text": text, "label": label}
            for number, (_, _, name, text, label) in enumerate(own, start=1)
        ]
        path = folder / "coco" / f"coco_pope_{category}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in labels))


def write_tables(root: Path) -> None:
    """Ids as on the hub: they begin anew in each split."""
    text = {"dtype": "string", "_type": "Value"}
    columns = ["id", "question_id", "question", "answer", "image_source", "image", "category"]
    features = {name: {"_type": "Image"} if name == "image" else text for name in columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (root / "Full").mkdir(parents=True)
    for category in CATEGORIES:
        own = [row for row in ROWS if row[1] == category]
        rows = [
            {
                "id": str(number),
                "question_id": str(number + 1),
                "question": question.replace("imange", "image"),
                "answer": label,
                "image_source": name,
                "image": {"bytes": image(name), "path": None},
                "category": category,
            }
            for number, (_, _, name, question, label) in enumerate(own)
        ]
        table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
        pq.write_table(table, root / "Full" / f"{category}-00000-of-00001.parquet")


def expected(texts: list[str]) -> float:
    """The mean of three F1, as 2 TP / (2 TP + FP + FN), in percent."""
    total = 0.0
    for category in CATEGORIES:
        hits = errors = 0
        for (_, of, _, _, label), text in zip(ROWS, texts, strict=True):
            words = text.split(".", 1)[0].replace(",", "").split(" ")
            answer = "no" if "No" in words or "no" in words or "not" in words else "yes"
            if of == category:
                hits += answer == label == "yes"
                errors += answer != label
        total += 100 * 2 * hits / (2 * hits + errors) if hits else 0
    return total / 3

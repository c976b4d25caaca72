"""A tiny GQA in the real formats: LLaVA's folder with the official questions file, and the hub's two tables."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

SUFFIX = "\nAnswer the question using a single word or phrase."

# id, image, question, right answer, structural type, semantic type
QUESTIONS = [
    ("201307251", "n161313", "Is it overcast?", "no", "verify", "global"),
    ("201640614", "n235859", "Who is wearing the dress?", "woman", "query", "rel"),
    ("202225914", "n336443", "Is the tall clock small or large?", "large", "choose", "attr"),
    ("201079951", "n161313", "Are there any cats or dogs?", "no", "logical", "obj"),
    ("20602949", "n235859", "What is the man holding?", "hot dog", "query", "rel"),
]


def jpeg(color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    """An image file of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], features: datasets.Features) -> None:
    """A table as the hub has it, with the features' types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows), features=features).to_parquet(path)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def color_of(name: str) -> tuple[int, int, int]:
    """Each image's own."""
    number = sum(map(ord, name))
    return 40 * number % 256, 90 * number % 256, 150


def _official(row: tuple[str, ...]) -> dict[str, Any]:
    name, image, question, answer, structural, semantic = row
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": [],
        "equivalent": [name],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "13-weather_cloudy"},
        "answer": answer,
        "semanticStr": "select: scene",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "weatherVerify", "semantic": semantic, "structural": structural},
        "fullAnswer": f"{answer.capitalize()}.",
    }


def write_folder(root: Path) -> None:
    """LLaVA's layout; the official file has one question more, which is not in the balanced set."""
    folder = root / "gqa"
    lines = [
        {"question_id": row[0], "image": f"{row[1]}.jpg", "text": row[2] + SUFFIX, "category": "default"}
        for row in QUESTIONS
    ]
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    (folder / "data" / "images").mkdir(parents=True)
    for image in sorted({row[1] for row in QUESTIONS}):
        (folder / "data" / "images" / f"{image}.jpg").write_bytes(jpeg(color_of(image)))
    official = {row[0]: _official(row) for row in QUESTIONS}
    official["999"] = {**_official(QUESTIONS[0]), "isBalanced": False}
    (folder / "data" / "testdev_balanced_questions.json").write_text(json.dumps(official))


def write_tables(root: Path) -> None:
    """The hub's: images come in another order than the questions ask about them."""
    text, flag = datasets.Value("string"), datasets.Value("bool")
    linked = {"objectId": text, "value": text}
    features = {
        "id": text,
        "imageId": text,
        "question": text,
        "answer": text,
        "fullAnswer": text,
        "isBalanced": flag,
        "groups": {"global": text, "local": text},
        "entailed": text,
        "equivalent": text,
        "types": {"structural": text, "semantic": text, "detailed": text},
        "annotations": {name: [linked] for name in ("question", "answer", "fullAnswer")},
        "semantic": [{"operation": text, "argument": text, "dependencies": [datasets.Value("int32")]}],
        "semanticStr": text,
    }
    rows = []
    for row in QUESTIONS:
        official = _official(row)
        changed: dict[str, Any] = {"entailed": "[]", "equivalent": f"['{row[0]}']"}
        changed["annotations"] = {name: [] for name in ("question", "answer", "fullAnswer")}
        rows.append({"id": row[0], **official, **changed})
    file = "testdev-00000-of-00001.parquet"
    write_parquet(root / "testdev_balanced_instructions" / file, rows, datasets.Features(features))
    images = [
        {"id": name, "image": {"bytes": jpeg(color_of(name)), "path": f"{name}.jpg"}}
        for name in sorted({row[1] for row in QUESTIONS}, reverse=True)
    ]
    features = datasets.Features({"id": text, "image": datasets.Image()})
    write_parquet(root / "testdev_balanced_images" / file, images, features)


def expected(texts: list[str]) -> float:
    """Percent of exact matches."""
    right = [text.rstrip(".").lower() == row[3] for text, row in zip(texts, QUESTIONS, strict=True)]
    return 100 * sum(right) / len(right)

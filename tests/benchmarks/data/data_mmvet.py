"""A tiny MM-Vet in the real format: LLaVA's folder, and a copy of the hub's repository."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import datasets
from PIL import Image

# Name, image, colour in it, question, ground truth, capabilities. As in the real data some images are jpg.
ITEMS = [
    ("v1_0", "v1_0.png", "red", "What is x in the equation?", "-1<AND>-5", ["ocr", "math"]),
    ("v1_1", "v1_1.png", "green", "What color is it?", "green<OR>lime", ["rec"]),
    ("v1_2", "v1_2.jpg", "blue", "What earth's interior structure does number 2 indicate?", "Mantle", ["math", "ocr"]),
    ("v1_3", "v1_3.png", "red", "Can you describe it?", "A red field", ["rec", "gen", "know"]),
]


def encoded(name: str, color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "JPEG" if name.endswith("jpg") else "PNG")
    return file.getvalue()


def write_folder(root: Path) -> None:
    folder = root / "mm-vet"
    (folder / "images").mkdir(parents=True)
    lines, metadata = [], {}
    for number, (name, image, color, question, answer, capabilities) in enumerate(ITEMS):
        (folder / "images" / image).write_bytes(encoded(image, color))
        lines.append(json.dumps({"image": image, "text": question, "category": "conv", "question_id": number}))
        metadata[name] = {
            "imagename": image,
            "question": question,
            "answer": answer,
            "imagesource": "https://example.org",
            "capability": capabilities,
        }
    (folder / "llava-mm-vet.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mm-vet.json").write_text(json.dumps(metadata, indent=4))


def write_tables(root: Path) -> None:
    names = ("question_id", "image", "question", "answer", "image_source", "capability")
    features = {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
    rows = [
        (name, {"bytes": encoded(image, color), "path": image}, question, answer, "source", ",".join(capabilities))
        for name, image, color, question, answer, capabilities in ITEMS
    ]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    path = root / "data" / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(path)


def expected(texts: list[str]) -> float:
    """The score with ``--judge exact``."""
    equation, color, mantle, field = (text.lower() for text in texts)
    right = [
        re.search(r"(?<!\w)-1\b", equation) and re.search(r"(?<!\w)-5\b", equation),
        re.search(r"\b(green|lime)\b", color),
        re.search(r"\bmantle\b", mantle),
        re.search(r"\bred field\b", field),
    ]
    return 100 * sum(map(bool, right)) / 4

"""A tiny LLaVA-Bench in the real format: LLaVA's folder, a copy of the hub's repository, and a judge's reviews."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

CAPTIONS = {"001.jpg": "A red field under no sky.", "002.jpg": "A blue field.\nIt is flat."}
# Id, image, category, question, GPT-4's answer.
ITEMS = [
    (0, "001.jpg", "conv", "What is the color of the field?", "It is red."),
    (1, "001.jpg", "detail", "Describe this photo in detail.", "There is nothing but a red field."),
    (2, "002.jpg", "complex", "Why is the field blue?", "Somebody painted it."),
    (3, "002.jpg", "complex", "How many people are there?", "There are none."),
]


def encoded(image: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red" if image == "001.jpg" else "blue").save(file, "JPEG")
    return file.getvalue()


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_folder(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    (folder / "images").mkdir(parents=True)
    for image in CAPTIONS:
        (folder / "images" / image).write_bytes(encoded(image))
    questions = [
        {"question_id": id_, "image": image, "category": category, "text": question}
        for id_, image, category, question, _ in ITEMS
    ]
    context = [{"id": image[:3], "image": image, "caption": caption} for image, caption in CAPTIONS.items()]
    answers = [
        {
            "question_id": id_,
            "prompt": question,
            "answer_id": f"answer{id_}",
            "model_id": "gpt-4-0314",
            "metadata": {},
            "text": reference,
        }
        for id_, _, _, question, reference in ITEMS
    ]
    _jsonl(folder / "questions.jsonl", questions)
    _jsonl(folder / "context.jsonl", context)
    _jsonl(folder / "answers_gpt4.jsonl", answers)


def write_tables(root: Path) -> None:
    names = ("question_id", "question", "image", "caption", "gpt_answer", "category", "image_id")
    features = {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
    rows = [
        (str(id_), question, {"bytes": encoded(image), "path": image}, CAPTIONS[image], reference, category, image)
        for id_, image, category, question, reference in ITEMS
    ]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    path = root / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(path)


def review(body: dict[str, Any], number: int = 0) -> str:
    """What the tests' judge answers to a request: 8 for GPT-4, for the model 2, and 1 more for every word up to 7.

    The question why has no rating.
    """
    content = body["messages"][-1]["content"]
    if "Why is the field blue?" in content:
        return "I cannot rate these."
    answer = content.split("[Assistant 2]\n")[1].split("\n\n[End of Assistant 2]")[0]
    return f"8 {2 + min(7, len(answer.split()))}\nAssistant 1 is right."


def expected(texts: list[str]) -> None:
    """Without a judge there is no score, and strings cannot stand in for one."""


def reviewed(texts: list[str]) -> float:
    """The score with the judge that gives these reviews."""
    first, second, _, fourth = (2 + min(7, len(text.split())) for text in texts)
    gpt4, model = (8 + 8 - 1 + 8) / 4, (first + second - 1 + fourth) / 4
    return round(round(model, 3) / round(gpt4, 3) * 100, 1)

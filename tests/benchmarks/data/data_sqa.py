"""ScienceQA in its real formats, small: LLaVA's folder and the hub's ``ScienceQA-IMG``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

# As in problems.json; "17" has no image, "21" no hint, and "33" belongs to another split.
PROBLEMS: dict[str, dict[str, Any]] = {
    "5": {
        "question": "Which material is this slide made of?",
        "choices": ["cardboard", "plastic"],
        "answer": 1,
        "hint": "Select the better answer.\nLook at the slide.",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "physics",
        "category": "Materials",
        "skill": "Identify materials in objects",
        "lecture": "A material is a type of matter.",
        "solution": "Look at it.",
        "split": "test",
    },
    "17": {
        "question": "Which word is a verb?",
        "choices": ["run", "red", "cat"],
        "answer": 0,
        "hint": "",
        "image": None,
        "task": "closed choice",
        "grade": "grade3",
        "subject": "language science",
        "topic": "grammar",
        "category": "Verbs",
        "skill": "Find verbs",
        "lecture": "",
        "solution": "",
        "split": "test",
    },
    "21": {
        "question": "What is the capital?",
        "choices": ["Salem", "Boise", "Denver", "Helena"],
        "answer": 3,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade4",
        "subject": "social science",
        "topic": "geography",
        "category": "State capitals",
        "skill": "Name capitals",
        "lecture": "",
        "solution": "",
        "split": "test",
    },
    "33": {
        "question": "Not asked?",
        "choices": ["yes", "no"],
        "answer": 0,
        "hint": "",
        "image": None,
        "task": "closed choice",
        "grade": "grade4",
        "subject": "natural science",
        "topic": "biology",
        "category": "Cells",
        "skill": "Cells",
        "lecture": "",
        "solution": "",
        "split": "train",
    },
}
TEST = ["5", "17", "21"]


def image_bytes(name: str) -> bytes:
    """A png; the second has a palette, as many there have."""
    file = io.BytesIO()
    image = Image.new("RGB", (20, 12), (int(name) * 9 % 256, 50, 60))
    (image.convert("P") if name == "21" else image).save(file, "png")
    return file.getvalue()


def _text(problem: dict[str, Any]) -> str:
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    options = "\n".join(f"{'ABCDE'[number]}. {choice}" for number, choice in enumerate(problem["choices"]))
    return f"{context}{problem['question']}\n{options}"


def write_truth(folder: Path) -> None:
    """What the official scorer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(PROBLEMS))
    splits = {"train": ["33"], "val": [], "test": TEST, "trainval": ["33"], "minitrain": [], "minival": []}
    (folder / "pid_splits.json").write_text(json.dumps(splits | {"minitest": []}))


def write_folder(root: Path) -> None:
    folder = root / "scienceqa"
    write_truth(folder)
    records = []
    for name in TEST:
        problem = PROBLEMS[name]
        record: dict[str, Any] = {"id": name}
        text = _text(problem)
        if problem["image"]:
            record["image"] = f"{name}/image.png"
            text = f"<image>\n{text}"
            path = folder / "images" / "test" / name / "image.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(image_bytes(name))
        answer = "ABCDE"[problem["answer"]]
        record["conversations"] = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        records.append(record)
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(records))


def write_tables(root: Path) -> None:
    """Config ``ScienceQA-IMG``, split ``test``."""
    columns = ["question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("int8"),
            **{column: datasets.Value("string") for column in columns},
        }
    )
    records = [
        {
            "image": {"bytes": image_bytes(name), "path": "image.png"},
            "choices": PROBLEMS[name]["choices"],
            "answer": PROBLEMS[name]["answer"],
            **{column: PROBLEMS[name][column] for column in columns},
        }
        for name in TEST
        if PROBLEMS[name]["image"]
    ]
    folder = root / "ScienceQA-IMG"
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(records, features=features).to_parquet(folder / "test-00000-of-00001.parquet")


def expected(texts: list[str]) -> float:
    """100 times the share of right ones of the two with an image; three texts are the folder's, two the hub's."""
    first, last = texts[0], texts[-1]
    right = [first == "B" or first.startswith("B. "), last == "D" or last.startswith("D. ")]
    return 100 * sum(right) / 2

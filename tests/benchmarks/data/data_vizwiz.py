"""A tiny VizWiz in the real formats: LLaVA's folder of the test set, the official val.json, the hub's val split."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
from data_gqa import color_of, jpeg, write_lines, write_parquet

from eval.scoring.vqa import normalise

INSTRUCTION = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
TEST = ["What is this? and what color is it?", "What is this? ", "How many ounces in this container? "]

# question as people said it, ten answers, type of answer
VALIDATION = [
    ("Ok. There is another picture, what is it?", ["unanswerable"] * 8 + ["unsuitable"] * 2, "unanswerable"),
    ("Which CD is this?", ["The Beatles"] * 2 + ["beatles"] + ["abbey road"] * 7, "other"),
    ("Is it on?", ["yes"] + ["no"] * 9, "yes/no"),
]


def write_folder(root: Path) -> None:
    """LLaVA's layout: no ground truth in it."""
    folder = root / "vizwiz"
    lines = [
        {
            "question_id": number,
            "image": f"VizWiz_test_{number:08d}.jpg",
            "text": question + INSTRUCTION,
            "category": "default",
        }
        for number, question in enumerate(TEST)
    ]
    write_lines(folder / "llava_test.jsonl", lines)
    (folder / "test").mkdir()
    for line in lines:
        (folder / "test" / line["image"]).write_bytes(jpeg(color_of(line["image"])))


def write_annotations(folder: Path) -> None:
    """The official val.json."""
    content = [
        {
            "image": f"VizWiz_val_{number:08d}.jpg",
            "question": question,
            "answers": [{"answer_confidence": "yes", "answer": human} for human in humans],
            "answer_type": kind,
            "answerable": int(kind != "unanswerable"),
        }
        for number, (question, humans, kind) in enumerate(VALIDATION)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "val.json").write_text(json.dumps(content))


def write_tables(root: Path) -> None:
    """The hub's val split; its ids have no ``.jpg`` (lmms-eval adds it for the server)."""
    text = datasets.Value("string")
    features = datasets.Features(
        {"question_id": text, "image": datasets.Image(), "question": text, "answers": [text], "category": text}
    )
    rows = [
        {
            "question_id": f"VizWiz_val_{number:08d}",
            "image": {"bytes": jpeg(color_of(question)), "path": f"VizWiz_val_{number:08d}.jpg"},
            "question": question,
            "answers": humans,
            "category": kind,
        }
        for number, (question, humans, kind) in enumerate(VALIDATION)
    ]
    write_parquet(root / "data" / "val-00000-of-00001.parquet", rows, features)


def expected(texts: list[str]) -> float:
    """VQA accuracy of answers to the hub's questions; by hand, the answers that get anything."""
    points = [
        {"unanswerable": 1, "unsuitable": 0.6},
        {"beatles": 0.9, "the beatles": 0.9, "abbey road": 1},
        {"yes": 0.3, "no": 1},
    ]
    given = [own.get(text.lower().rstrip("."), 0) for text, own in zip(texts, points, strict=True)]
    return 100 * sum(given) / len(given)


def expected_submission(texts: list[str]) -> list[dict[str, str]]:
    """What EvalAI gets of answers to the folder's questions (``normalise`` has its own tests)."""
    return [
        {"image": f"VizWiz_test_{number:08d}.jpg", "answer": normalise(text)}
        for number, text in zip(range(len(TEST)), texts, strict=True)
    ]

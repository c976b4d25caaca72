"""A tiny TextVQA in the real formats: LLaVA's questions with OCR tokens, the official annotations, the hub's table."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
from data_gqa import SUFFIX, color_of, jpeg, write_lines, write_parquet

# image, question as the official file has it, OCR tokens, ten people's answers
QUESTIONS = [
    (
        "003a8ae2ef43b901",
        "what is the brand of this camera?",
        ["DAKOTA", "DIGITAL", "Single-Use", "Camera"],
        ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 5, "Dakota"],
    ),
    ("831bcec304a17054", "What brand liquor is on the right?", ["MALT"], ["glenmorangie"] * 8 + ["malt"] * 2),
    (
        "831bcec304a17054",  # the same image again, so that the id is no key
        "How long has the drink on the right been aged?",
        ["MALT"],
        ["10 years"] * 2 + ["ten years"] + ["10"] * 7,
    ),
    ("97b1112b17015396", "Whats the lowest number yard line that you can see?", [], ["20"] * 9 + ["30"]),
]
CAPITAL = [question.capitalize() for _, question, _, _ in QUESTIONS]


def write_folder(root: Path) -> None:
    """LLaVA's layout."""
    folder = root / "textvqa"
    lines = [
        {
            "question_id": image,
            "image": f"{image}.jpg",
            "text": f"{capital}\nReference OCR token: {', '.join(tokens)}{SUFFIX}",
            "category": "default",
        }
        for (image, _, tokens, _), capital in zip(QUESTIONS, CAPITAL, strict=True)
    ]
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    (folder / "train_images").mkdir()
    for image in {image for image, _, _, _ in QUESTIONS}:
        (folder / "train_images" / f"{image}.jpg").write_bytes(jpeg(color_of(image)))
    data = [
        {
            "question": question,
            "image_id": image,
            "image_classes": ["Camera"],
            "flickr_original_url": "https://farm2.staticflickr.com/4.jpg",
            "flickr_300k_url": "https://c2.staticflickr.com/4.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": answers,
            "question_tokens": question.rstrip("?").lower().split(),
            "question_id": 34602 + number,
            "set_name": "val",
        }
        for number, (image, question, _, answers) in enumerate(QUESTIONS)
    ]
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps(content))


def write_tables(root: Path) -> None:
    """The hub's validation split."""
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = datasets.Features(
        {
            "image_id": text,
            "question_id": number,
            "question": text,
            "question_tokens": [text],
            "image": datasets.Image(),
            "image_width": number,
            "image_height": number,
            "flickr_original_url": text,
            "flickr_300k_url": text,
            "answers": [text],
            "image_classes": [text],
            "set_name": text,
            "ocr_tokens": [text],
        }
    )
    rows = [
        {
            "image_id": image,
            "question_id": 34602 + index,
            "question": question,
            "question_tokens": question.rstrip("?").lower().split(),
            "image": {"bytes": jpeg(color_of(image)), "path": f"{image}.jpg"},
            "image_width": 1024,
            "image_height": 664,
            "flickr_original_url": "https://farm2.staticflickr.com/4.jpg",
            "flickr_300k_url": "https://c2.staticflickr.com/4.jpg",
            "answers": answers,
            "image_classes": ["Camera"],
            "set_name": "val",
            "ocr_tokens": tokens,
        }
        for index, (image, question, tokens, answers) in enumerate(QUESTIONS)
    ]
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", rows, features)


def expected(texts: list[str]) -> float:
    """VQA accuracy; by hand, the answers that get anything."""
    points = [
        {"dakota": 1, "nous les gosses": 0.3, "clos culombu": 0.3, "dakota digital": 0.3},
        {"glenmorangie": 1, "malt": 0.6},
        {"10 years": 0.9, "ten years": 0.9, "10": 1, "ten": 1},
        {"20": 1, "30": 0.3},
    ]
    given = [own.get(text.lower().rstrip("."), 0) for text, own in zip(texts, points, strict=True)]
    return 100 * sum(given) / len(given)

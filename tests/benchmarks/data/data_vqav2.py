"""A tiny VQAv2 in the real formats: LLaVA's folder of test-dev, official annotations, the hub's validation split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from data_gqa import SUFFIX, color_of, jpeg, write_lines, write_parquet

from eval.scoring.vqa import normalise

# id, image, question; test-dev's are among test2015's, which are more
TEST_DEV = [
    (262144000, 262144, "Is the ball flying towards the batter?"),
    (262144001, 262144, "What sport is this?"),
    (262144005, 262145, "How many people are there?"),
]
TEST = [(262144002, 262144, "What color is the shirt?"), *reversed(TEST_DEV)]

# id, image, question, ten people's answers, type of answer
VALIDATION = [
    (262148000, 262148, "Where is he looking?", ["down"] * 5 + ["at table"] * 3 + ["skateboard"] * 2, "other"),
    (262148001, 262148, "Is he wearing a hat?", ["yes"] * 10, "yes/no"),
    (393225001, 393225, "How many cups are there?", ["2"] * 3 + ["two"] * 2 + ["3"] * 5, "number"),
    (393225002, 393225, "What animal is it?", ["Cat"] * 10, "other"),  # all say the same: case matters
]


def write_folder(root: Path) -> None:
    """LLaVA's layout: no ground truth in it."""
    folder = root / "vqav2"
    for file, questions in (("test-dev2015", TEST_DEV), ("test2015", TEST)):
        lines = [
            {
                "question_id": name,
                "image": f"COCO_test2015_{image:012d}.jpg",
                "text": question + SUFFIX,
                "category": "default",
            }
            for name, image, question in questions
        ]
        write_lines(folder / f"llava_vqav2_mscoco_{file}.jsonl", lines)
    (folder / "test2015").mkdir()
    for image in {image for _, image, _ in TEST}:
        (folder / "test2015" / f"COCO_test2015_{image:012d}.jpg").write_bytes(jpeg(color_of(str(image))))


def _annotation(row: tuple[Any, ...]) -> dict[str, Any]:
    name, image, question, humans, kind = row
    return {
        "question_type": question.split()[0].lower(),
        "multiple_choice_answer": max(humans, key=humans.count),
        "answers": [
            {"answer": human, "answer_confidence": "yes", "answer_id": number}
            for number, human in enumerate(humans, start=1)
        ],
        "image_id": image,
        "answer_type": kind,
        "question_id": name,
    }


def write_annotations(folder: Path) -> None:
    """The official annotations of the validation set."""
    content = {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017},
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/"},
        "data_subtype": "val2014",
        "data_type": "mscoco",
        "annotations": [_annotation(row) for row in VALIDATION],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(content))


def write_tables(root: Path) -> None:
    """The hub's validation split."""
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(
        {
            "question_type": text,
            "multiple_choice_answer": text,
            "answers": [{"answer": text, "answer_confidence": text, "answer_id": number}],
            "image_id": number,
            "answer_type": text,
            "question_id": number,
            "question": text,
            "image": datasets.Image(),
        }
    )
    rows = [
        {
            **_annotation(row),
            "question": row[2],
            "image": {"bytes": jpeg(color_of(str(row[1]))), "path": f"COCO_val2014_{row[1]:012d}.jpg"},
        }
        for row in VALIDATION
    ]
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", rows, features)


def expected(texts: list[str]) -> float:
    """VQA accuracy of answers to the hub's questions; by hand, the answers that get anything."""
    points = [
        {"down": 1, "at table": 0.9, "skateboard": 0.6},
        {"yes": 1},
        {"2": 1, "two": 1, "3": 1},
        {},  # LLaVA sends "cat", which is not "Cat"
    ]
    given = [own.get(text.lower().rstrip("."), 0) for text, own in zip(texts, points, strict=True)]
    return 100 * sum(given) / len(given)


def expected_submission(texts: list[str]) -> list[dict[str, Any]]:
    """What EvalAI gets of answers to the folder's questions (``normalise`` has its own tests)."""
    answers = {row[0]: normalise(text) for row, text in zip(TEST_DEV, texts, strict=True)}
    return [{"question_id": row[0], "answer": answers.get(row[0], "")} for row in TEST]

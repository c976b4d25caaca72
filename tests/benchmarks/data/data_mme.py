"""A tiny MME, as LLaVA's folder and as a copy of lmms-lab/MME: eight questions about four images, three subtasks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
YES_OR_NO = "Please answer yes or no."
# id, question, what is between it and "Please answer yes or no." (two blanks in a few questions), right answer
ROWS = [
    ("code_reasoning/0020.png", "Is a python code shown in the picture?", " ", "Yes"),
    ("code_reasoning/0020.png", "Is a c++ code shown in the picture?", "  ", "No"),
    ("existence/000000006040.jpg", "Is there a train in this image?", " ", "Yes"),
    ("existence/000000006040.jpg", "Is there a bed in this image?", " ", "No"),
    ("existence/000000006471.jpg", "Is there a bat in this image?", " ", "Yes"),
    ("existence/000000006471.jpg", "Is there a refrigerator in this image?", " ", "No"),
    ("landmark/images/00d5eb99f0c5a4b5.jpg", "Is this a photo of Brunei?", " ", "Yes"),
    ("landmark/images/00d5eb99f0c5a4b5.jpg", "Is this a photo of Amberg?", " ", "No"),
]
SUBTASKS = ("code_reasoning", "existence", "landmark")


def image(name: str) -> bytes:
    file = io.BytesIO()
    colour = tuple((31 * sum(map(ord, name)) * factor) % 256 for factor in (1, 3, 7))
    Image.new("RGB", (36, 28), colour).save(file, "PNG" if name.endswith("png") else "JPEG")
    return file.getvalue()


def write_folder(root: Path) -> None:
    """With ``images`` and ``questions_answers_YN`` for landmark, without for the others, as in the release."""
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    for name, question, blanks, answer in ROWS:
        path = release / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(name))
        place = path.parent if path.parent.name != "images" else path.parents[1] / "questions_answers_YN"
        place.mkdir(exist_ok=True)
        with (place / f"{path.stem}.txt").open("a") as file:
            file.write(f"{question}{blanks}{YES_OR_NO}\t{answer}\n")
    questions = [
        {"question_id": name, "image": name, "text": question + SHORT, "category": name.split("/", 1)[0]}
        for name, question, _, _ in ROWS
    ]
    (folder / "llava_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def write_results(root: Path) -> None:
    """The official tool's files of right answers, for whom has not the release."""
    folder = root / "MME" / "eval_tool" / "Your_Results"
    folder.mkdir(parents=True)
    for name, question, blanks, answer in ROWS:
        with (folder / f"{name.split('/', 1)[0]}.txt").open("a") as file:
            file.write(f"{Path(name).name}\t{question}{blanks}{YES_OR_NO}\t{answer}\n")


def write_tables(root: Path) -> None:
    text = {"dtype": "string", "_type": "Value"}
    columns = ["question_id", "image", "question", "answer", "category"]
    features = {name: {"_type": "Image"} if name == "image" else text for name in columns}
    rows = [
        {
            "question_id": name.replace("/images", ""),
            "image": {"bytes": image(name), "path": None},
            "question": f"{question}{blanks}{YES_OR_NO}",
            "answer": answer,
            "category": name.split("/", 1)[0],
        }
        for name, question, blanks, answer in ROWS
    ]
    (root / "data").mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, root / "data" / "test-00000-of-00001.parquet")


def expected(texts: list[str]) -> float:
    """100 for each subtask's share of right answers, and 100 for its share of images with two."""
    right = []
    for (_, _, _, answer), text in zip(ROWS, texts, strict=True):
        start = text[:4].lower()
        said = "Yes" if "yes" in start else "No" if "no" in start else "other"
        right.append(said == answer)
    total = 0.0
    for first, last in ((0, 2), (2, 6), (6, 8)):  # code_reasoning, existence, landmark
        own = right[first:last]
        pairs = [own[start] and own[start + 1] for start in range(0, len(own), 2)]
        total += 100 * sum(own) / len(own) + 100 * sum(pairs) / len(pairs)
    return total

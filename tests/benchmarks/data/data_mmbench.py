"""MMBench in its real formats, small: LLaVA's TSV and the hub's parquet, in English or Chinese."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

FILES = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"]
COLUMNS += ["l2-category", "comment", "split"]

# Three questions: four options with a hint, two options, and three; rotations at + 1,000,000.
_TEXTS = {
    "mmbench": [
        (241, "Which one is shown?", "A bar has two\nends.", ["cat", "dog", "cow", "hen"], "B"),
        (252, 'Does "it" rain?', None, ["yes", "no"], "A"),
        (260, "How many?", None, ["one", "two", "three"], "C"),
    ],
    "mmbench_cn": [
        (241, "图中是哪一个？", "一根棒有两端。", ["猫", "狗", "牛", "鸡"], "B"),  # noqa: RUF001
        (252, "下雨了吗？", None, ["是", "否"], "A"),  # noqa: RUF001
        (260, "有多少？", None, ["一", "二", "三"], "C"),  # noqa: RUF001
    ],
}
_CATEGORIES = {
    241: ("object_localization", "finegrained_perception (instance-level)"),
    252: ("image_scene", "coarse_perception"),
    260: ("object_localization", "finegrained_perception (instance-level)"),
}


def image_bytes(question: int) -> bytes:
    """A jpeg; rotations of a question have the same."""
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (question % 256, 90, 200)).save(file, "jpeg")
    return file.getvalue()


def rows(name: str = "mmbench") -> list[dict[str, Any]]:
    """All rotations: first all questions, then all of them rotated once, and so on, as in the real file."""
    found = []
    for turn in range(4):
        for base, question, hint, options, answer in _TEXTS[name]:
            if turn >= len(options):
                continue
            turned = options[turn:] + options[:turn]
            category, ability = _CATEGORIES[base]
            found.append(
                {
                    "index": base + turn * 1_000_000,
                    "question": question,
                    "hint": hint,
                    **dict(zip("ABCD", [*turned, None, None][:4], strict=True)),
                    "answer": "ABCD"[turned.index(options["ABCD".index(answer)])],
                    "category": category,
                    "image": image_bytes(base),
                    "source": "made",
                    "l2-category": ability,
                    "comment": None,
                    "split": "dev",
                }
            )
    return found


def write_folder(root: Path, name: str = "mmbench") -> None:
    write_tsv(root / name / FILES[name], rows(name))


def write_tsv(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(column for column in COLUMNS if column in records[0])]
    for row in records:
        image = row["image"] if isinstance(row["image"], str) else base64.b64encode(row["image"]).decode()
        cells = {**row, "image": image}
        lines.append("\t".join(_quoted(cells[column]) for column in COLUMNS if column in cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quoted(cell: Any) -> str:
    text = "" if cell is None else str(cell)
    return '"' + text.replace('"', '""') + '"' if {'"', "\n"} & {*text} else text


def write_tables(root: Path, name: str = "mmbench") -> None:
    """Config ``en`` or ``cn``, split ``dev``; what is missing is the text nan."""
    records = []
    for row in rows(name):
        cells = {column: "nan" if cell is None else cell for column, cell in row.items()}
        ability = cells.pop("l2-category")
        records.append({**cells, "image": {"bytes": row["image"], "path": None}, "L2-category": ability})
    text = {column: datasets.Value("string") for column in records[0]}
    features = datasets.Features({**text, "index": datasets.Value("int64"), "image": datasets.Image()})
    folder = root / {"mmbench": "en", "mmbench_cn": "cn"}[name]
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(records, features=features).to_parquet(folder / "dev-00000-of-00001.parquet")


def expected(texts: list[str], name: str = "mmbench") -> float:
    """100 times the share of questions with the right letter in all rotations."""
    wrong = set()
    for row, text in zip(rows(name), texts, strict=True):
        options = [letter for letter in "ABCD" if row[letter] and row[letter].lower() in text.lower()]
        said = _said(text.split()) or (options[0] if len(options) == 1 else None)
        if said != row["answer"]:
            wrong.add(row["index"] % 1_000_000)
    return 100 * (3 - len(wrong)) / 3


def _said(words: list[str]) -> str | None:
    """The only letter that stands alone, else the only one with the same marks around it."""
    for marks in ["X", "X.", "X,", "X:", "X)", "X).", "(X)", "(X).", ":X", ":X,", ":X.", ":X)", ":X)."]:
        letters = [letter for letter in "ABCDE" if marks.replace("X", letter) in words]
        article = marks == "X" and "A" in words and len(words) > 3
        if len(letters) == 1 and not article:
            return letters[0]
    return None

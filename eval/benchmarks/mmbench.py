"""MMBench and MMBench-CN: each question is asked once for each rotation of its two to four options.

Data: LLaVA's folder has a TSV with images in base64 (a number in place of one names the row that has it, as in later
releases). Rotations are rows whose ``index`` is the question's plus a multiple of 1,000,000: 4,377 rows of 1,176
questions in English. The hub's ``lmms-lab/MMBench`` is a later release (4,329 rows in English), in which a missing
cell is the text ``nan``. A test split's TSV (``mmbench_test*.tsv``) is taken where there is no dev split's: it has no
answers and can only be submitted.
Prompt: hint (where there is one), question, options, and LLaVA's instruction for a letter, in English or Chinese.
Metric: circular accuracy: a question is right if all its rows are. An answer's letter is found by MMBench's own two
steps without a language model; where these fail, MMBench asks GPT or draws at random, but here the answer is wrong
and counted as ``undecided``, so that the score is the same every time.
Submission: an Excel file, with LLaVA's columns.
"""

from __future__ import annotations

import base64
import binascii
import io
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava.images import load_image
from llava.storage.files import write_atomically

from ..benchmark import Benchmark
from ..reading.fingerprint import checksum_of_bytes
from ..reading.mmbench_rows import LETTERS, checked_rows, find_tsv, read_rows
from ..reading.questions import LETTER, lettered, listed
from ..reading.sources import need
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table, Visual
from ..scoring.matching import match, percent, percent_by

if TYPE_CHECKING:
    from ..scoring.judge import Judge

_ROTATION = 1_000_000
_CHINESE = "请直接回答选项字母。"
_SUBMITTED = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")

# What may stand around a letter, in the order of MMBench's evaluator; it counts E, too.
_DECORATED = (
    "{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{})."
)  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """The rows of a split, without images.

    Attributes:
        name: of the file or table; the submission is called so.
        rows: cells by column; empty cells are None.
        partly: of how many questions only some rotations are there, as a limit left the others out.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    partly: int = 0


def questions(folder: Path, dev: str, instruction: str) -> list[Question]:
    """The rows of the TSV, in its order.

    Args:
        folder: LLaVA's.
        dev: name of the dev split's TSV.
        instruction: the last line of the user's turn.
    """
    path = find_tsv(folder, dev)
    rows = read_rows(path)
    images = {int(row["index"]): need(row, "image", str(path)) for row in rows}
    seen: dict[str, Visual] = {}  # rotations have the same image; then their questions share its visual tokens
    asked = []
    for row in rows:
        name = int(row["index"])
        content = images[name] or ""
        if content.isdecimal():
            content = images.get(int(content)) or ""
        key = f"{path} image of index {name}"
        visual = Visual(key, partial(_open, content, key), content=partial(checksum_of_bytes, content.encode()))
        asked.append(_question(row, seen.setdefault(content, visual), instruction))
    return asked


def questions_of_tables(tables: Tables, instruction: str) -> list[Question]:
    """The rows of the hub's dev split, in their order; rotations are shown the image of their question's first row."""
    rows = tables["dev"]
    first: dict[int, Visual] = {}
    asked = []
    for index, row in enumerate(checked_rows(rows.without("image"), rows.name)):
        visual = first.setdefault(int(row["index"]) % _ROTATION, rows.picture(index))
        asked.append(_question(row, visual, instruction))
    return asked


def _question(row: Mapping[str, Any], visual: Visual, instruction: str) -> Question:
    options = _leading_options(row)
    hint = "" if row["hint"] is None else f"{row['hint']}\n"
    prompt = listed(f"{hint}{row['question']}", options)
    extra = {"round_id": 0, "options": options, "option_char": [*lettered(options)]}
    return Question(
        int(row["index"]), f"{prompt}\n{instruction}", (visual,), row.get("category") or "default", prompt, extra
    )


def _leading_options(row: Mapping[str, Any]) -> list[str]:
    """The options that are asked: LLaVA stops at the first empty one."""
    options = []
    for letter in LETTERS:
        if row[letter] is None:
            break
        options.append(row[letter])
    return options


def _open(content: str, name: str) -> list[Image.Image]:
    try:
        return [load_image(base64.b64decode(content), as_stored=True, name=name)]
    except binascii.Error as error:
        raise ValueError(f"{name} is no base64 ({error}): fetch the file again") from error


def truth(folder: Path, dev: str) -> Truth:
    """The rows of the TSV."""
    path = find_tsv(folder, dev)
    return Truth(path.stem, read_rows(path, images=False))


def truth_of_tables(tables: Tables, name: str) -> Truth:
    """The rows of the hub's dev split."""
    rows = tables["dev"]
    return Truth(name, checked_rows(rows.without("image"), rows.name))


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses; None if it is undecided.

    First, of the words between blanks, exactly one letter from A to E: as it is (but with ``A`` in more than three
    words, that may be an article), then in each of the decorated forms in turn. Else the only option whose text is in
    the answer, in lower case. Source: MMBench's evaluator, before it asks GPT.

    Args:
        text: the answer.
        options: the row's, by letter.
    """
    words = text.split()
    for form in _DECORATED:
        there = [name for name in string.ascii_uppercase[:5] if form.format(name) in words]
        if len(there) == 1 and not (form == "{}" and "A" in words and len(words) > 3):
            return there[0]
    said = [name for name, option in options.items() if option.lower() in text.lower()]
    return said[0] if len(said) == 1 else None


def score(answers: Sequence[Answer], truth: Truth, judge: Judge | None = None) -> Score:
    """Circular accuracy, in percent: the share of questions with the right answer in every rotation.

    A row without an answer counts as wrong. ``points`` are the questions', in the order of their first rows.

    Raises:
        ValueError: no answer is to a row here, or the split has no answers to compare with.
    """
    rows = {str(int(row["index"])): row for row in truth.rows}
    if any(row.get("answer") is None for row in rows.values()):
        raise ValueError(f"{truth.name} has no answers to compare with: submit the Excel file to MMBench's server")
    matched = match(answers, rows)
    found = matched.answers
    chosen = {
        name: letter(answer.text, {each: rows[name][each] for each in LETTERS if rows[name][each] is not None})
        for name, answer in found.items()
    }
    right = {name: float(chosen.get(name) == row["answer"]) for name, row in rows.items()}
    points: dict[int, float] = {}
    first: dict[int, Mapping[str, Any]] = {}
    for name, row in rows.items():
        question = int(name) % _ROTATION
        points[question] = min(points.get(question, 1.0), right[name])
        first.setdefault(question, row)
    unrotated = [point for name, point in right.items() if int(name) < _ROTATION]
    by_category, by_ability = (
        percent_by((row[column], points[question]) for question, row in first.items() if row.get(column) is not None)
        for column in ("category", "l2-category")
    )
    circular = percent(points.values())
    details = {
        "circular": circular,
        "all_rows": percent(right.values()),
        **({"first_rotation": percent(unrotated)} if unrotated else {}),
        "categories": by_category,
        "l2_categories": by_ability,
        "base_questions": len(points),
        "correct": int(sum(points.values())),
        "undecided": sum(each is None for each in chosen.values()),
        **matched.counts,
    }
    some = f" (of {truth.partly} of {len(points)} questions not all rotations were asked)" if truth.partly else ""
    return Score(f"circular accuracy{some}", circular, details, by_ability, list(points.values()))


def _asked(answers: Sequence[Answer], truth: Truth) -> Truth:
    """The rows that some answers are to. Of a question's rotations those that were asked decide, then."""
    there = match(answers, (int(row["index"]) for row in truth.rows)).answers
    rows = [row for row in truth.rows if int(row["index"]) in there]
    questions = {int(row["index"]) % _ROTATION for row in rows}
    left_out = {int(row["index"]) % _ROTATION for row in truth.rows if int(row["index"]) not in there}
    return replace(truth, rows=rows, partly=len(questions & left_out))


def submit(answers: Sequence[Answer], truth: Truth, folder: Path) -> Path:
    """Write the Excel file for MMBench's server, with the columns that LLaVA's converter leaves.

    Source: LLaVA's ``convert_mmbench_for_submission.py``. Rows without an answer have an empty prediction.
    """
    from openpyxl import Workbook  # noqa: PLC0415 - of the extra `eval`
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE  # noqa: PLC0415

    found = match(answers, (int(row["index"]) for row in truth.rows)).answers
    book = Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    columns = [name for name in _SUBMITTED if name == "prediction" or name in truth.rows[0]]
    sheet.append(columns)
    for number, row in enumerate(truth.rows, start=2):
        name = int(row["index"])
        answer = found.get(name)
        cells = {**row, "index": name, "prediction": None if answer is None else answer.text}
        for place, column in enumerate(columns, start=1):
            cell = sheet.cell(number, place)
            if isinstance(cells[column], str):
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", cells[column])
                cell.data_type = "s"  # an answer that begins with = is no formula
            else:
                cell.value = cells[column]
    path = folder / f"{truth.name}.xlsx"
    content = io.BytesIO()  # on a full disk, a zip file that is written there would have the last word
    book.save(content)
    write_atomically(path, content.getvalue())
    return path


def _benchmark(name: str, title: str, summary: str, dev: str, config: str, instruction: str) -> Benchmark:
    source = f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{dev}"
    return Benchmark(
        name=name,
        title=title,
        summary=summary,
        folder=name,
        files=(File(dev, source),),
        tables={"dev": Table("lmms-lab/MMBench", "dev", config)},
        max_new_tokens=1024,
        from_folder=partial(questions, dev=dev, instruction=instruction),
        from_tables=partial(questions_of_tables, instruction=instruction),
        truth_from_folder=partial(truth, dev=dev),
        truth_from_tables=partial(truth_of_tables, name=f"{name}_dev"),
        score=score,
        submit=submit,
        missing="count as wrong",
        asked=_asked,
    )


BENCHMARKS = (
    _benchmark(
        "mmbench",
        "MMBench",
        "abilities, rotated options (circular accuracy; 1,176 questions in 4,377 rows)",
        "mmbench_dev_20230712.tsv",
        "en",
        LETTER,
    ),
    _benchmark(
        "mmbench_cn",
        "MMBench-CN",
        "MMBench in Chinese (circular accuracy)",
        "mmbench_dev_cn_20231003.tsv",
        "cn",
        _CHINESE,
    ),
)

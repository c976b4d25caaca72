"""MMMU: 900 questions of college level in 30 subjects, 847 with options and 53 open, on the validation split.

Data: LLaVA has none; the folder holds parquet files of ``lmms-lab/MMMU`` or ``MMMU/MMMU`` (``validation-*.parquet``,
at any depth) to ask from, and the official ``answer_dict_val.json`` (at any depth, too) to score with; either is
enough to score.
Prompt: that of the official LLaVA run. Only ``image_1`` is shown; ``<image 1>`` stays in the text as it is. (The
official script means to leave out questions with several images as options, but looks for a marker that the data do
not have, so that it asks them like all others. So does this.)
Metric: the share of right answers among those given, over all subjects; open answers go through the official parser.
Those with options do, too, where the options are known (``main_parse_and_eval.py``): from parquet files, or from the
answer's own field ``index2ans``, as the official ``output.json`` of each subject has it. With ``answer_dict_val.json``
alone an answer must be the bare letter (``main_eval_only.py``: what it is given has been parsed, as the official
``total_val_output.json`` has been).
Where the parser finds no letter, it draws one at random. As in the official tool, the draws are those of
``random.seed(42)``, in the order of the subjects' names, and within a subject in that of the data.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..benchmark import Benchmark
from ..reading.questions import LETTER, SHORT_ANSWER, lettered
from ..reading.sources import need, read_json, refuse_repeated
from ..reading.tables import Rows, Tables, parquet_files
from ..records import Answer, File, Question, Score, Table
from ..scoring.matching import match, percent, percent_by, unreadable
from ..scoring.mmmu_parser import is_right, letter

if TYPE_CHECKING:
    from ..scoring.judge import Judge

_ANSWERS = "answer_dict_val.json"
_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_TABLES = {"validation": Table("lmms-lab/MMMU", "validation")}
_SEED = 42

_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DOMAIN_OF = {subject: domain for domain, subjects in _DOMAINS.items() for subject in subjects}


@dataclass(frozen=True)
class Gold:
    """What an answer is compared with.

    Attributes:
        answers: those that are right: one letter, or one or more texts.
        open: a question without options.
        options: by letter; None where they are not known.
    """

    answers: tuple[str, ...]
    open: bool
    options: Mapping[str, str] | None = None


def questions(folder: Path) -> list[Question]:
    """The questions in a folder's parquet files.

    Raises:
        FileNotFoundError: it has none.
    """
    return questions_of_tables(Tables(_TABLES, folder))


def questions_of_tables(tables: Tables) -> list[Question]:
    """The questions of the validation split, in the order of its rows."""
    rows = tables["validation"]
    asked = []
    for index, row in enumerate(_read(rows)):
        text = row["question"]
        if row["question_type"] == "multiple-choice":
            options = "".join(f"({letter}) {option}\n" for letter, option in _options(row, rows.name).items())
            text = f"{text}\n\n{options}\n\n{LETTER}"
        else:
            text = f"{text}\n{SHORT_ANSWER}"
        asked.append(Question(row["id"], text, (rows.picture(index, "image_1"),), subject_of(row["id"])))
    return asked


def _read(rows: Rows) -> list[dict[str, Any]]:
    read = list(rows.without(*_IMAGES))
    for index, row in enumerate(read):
        for name in ("id", "question", "options", "answer", "question_type"):
            need(row, name, f"{rows.name} row {index}")
    refuse_repeated((row["id"] for row in read), rows.name)
    return read


def _options(row: Mapping[str, Any], where: str) -> dict[str, str]:
    options = lettered(_listed(row["options"], f"options of {row['id']} in {where}"))
    if not options:
        raise ValueError(f"{row['id']} in {where} has no options, though it is {row['question_type']}: fetch it again")
    return options


def _listed(text: Any, where: str) -> list[str]:
    """A list that the data have as Python's text of it."""
    try:
        found = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{where} are no list, but {text!r}: fetch the data again") from error
    return [str(each) for each in found]


def subject_of(name: str) -> str:
    """The subject in a question's id: ``Art_Theory`` in ``validation_Art_Theory_7``."""
    return "_".join(name.split("_")[1:-1])


def truth(folder: Path) -> dict[str, Gold]:
    """The right answers, and the options if there are parquet files.

    Raises:
        FileNotFoundError: there are neither those nor ``answer_dict_val.json``.
    """
    path = next(iter(sorted(folder.rglob(_ANSWERS), key=lambda path: len(path.parts))), None)
    try:
        parquet_files(folder, _TABLES["validation"])
    except FileNotFoundError as error:
        if path is None:
            raise FileNotFoundError(
                f"there is no {folder / _ANSWERS} (https://github.com/MMMU-Benchmark/MMMU has it), and {error}"
            ) from error
        return _official(path)
    known = truth_of_tables(Tables(_TABLES, folder))
    if path is None:
        return known
    return {
        name: replace(gold, options=known[name].options) if name in known else gold
        for name, gold in _official(path).items()
    }


def _official(path: Path) -> dict[str, Gold]:
    gold = {}
    for name, record in read_json(path).items():
        where = f"{name} in {path}"
        answer, kind = need(record, "ground_truth", where), need(record, "question_type", where)
        gold[name] = Gold(
            tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),), kind != "multiple-choice"
        )
    return gold


def truth_of_tables(tables: Tables) -> dict[str, Gold]:
    """The right answers and the options of the validation split."""
    rows = tables["validation"]
    gold = {}
    for row in _read(rows):
        answer, is_open = str(row["answer"]), row["question_type"] != "multiple-choice"
        if is_open:
            # Several answers are the text of a list, here, too.
            several = answer.startswith("[") and answer.endswith("]")
            answers = tuple(_listed(answer, f"answers of {row['id']}")) if several else (answer,)
            gold[row["id"]] = Gold(answers, is_open)
        else:
            gold[row["id"]] = Gold((answer,), is_open, _options(row, rows.name))
    return gold


def score(answers: Sequence[Answer], truth: Mapping[str, Gold], judge: Judge | None = None) -> Score:
    """Accuracy over all answers, in percent.

    As in the official tools, a question without an answer does not count. ``points`` are those of the answers.
    No letter is drawn for an answer whose image could not be read: it is wrong.

    Raises:
        ValueError: no answer is to a question here.
    """
    matched = match(answers, truth)
    found = matched.answers
    generator = random.Random(_SEED)
    at_random = not_letters = 0
    right: dict[str, float] = {}
    for name in sorted((name for name in truth if name in found), key=subject_of):
        answer, gold = found[name], truth[name]
        options = gold.options or answer.extra.get("index2ans")
        if unreadable(answer):
            right[name] = 0.0
            continue
        if gold.open:
            right[name] = float(is_right(answer.text, gold.answers))
            continue
        if options:
            chosen = letter(answer.text, options)
            if chosen is None:
                at_random += 1
                chosen = generator.choice(list(options))
        else:
            chosen = answer.text
            not_letters += not re.fullmatch("[A-Z]", chosen)
        right[name] = float(chosen in gold.answers)
    subjects = percent_by((subject_of(name), point) for name, point in right.items())
    found_domains = percent_by((_DOMAIN_OF.get(subject_of(name), "other"), point) for name, point in right.items())
    domains = {name: found_domains[name] for name in (*_DOMAINS, "other") if name in found_domains}
    kinds = percent_by(("open" if truth[name].open else "multiple_choice", point) for name, point in right.items())
    overall = percent(right.values())
    details = {
        **kinds,
        "domains": domains,
        "subjects": subjects,
        "correct": int(sum(right.values())),
        "random": at_random,
        "not_letters": not_letters,
        **matched.counts,
    }
    return Score("accuracy", overall, details, domains, [right[name] for name in found])


_MMMU = "https://huggingface.co/datasets/lmms-lab/MMMU"

BENCHMARK = Benchmark(
    name="mmmu",
    title="MMMU",
    summary="college subjects, validation split (accuracy; 900 questions, 53 of them open)",
    folder="mmmu",
    files=(
        File(
            "data/",
            f"{_MMMU}: `hf download --repo-type dataset lmms-lab/MMMU --include 'data/validation-*' --local-dir` "
            "this folder",
            "run",
        ),
        File(
            _ANSWERS, "https://github.com/MMMU-Benchmark/MMMU, folder mmmu (needed without the parquet files)", "score"
        ),
    ),
    tables=_TABLES,
    max_new_tokens=128,
    from_folder=questions,
    from_tables=questions_of_tables,
    truth_from_folder=truth,
    truth_from_tables=truth_of_tables,
    score=score,
)

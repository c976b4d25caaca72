"""MM-Vet: 218 open questions that need several capabilities at once, graded from 0 to 1 by GPT-4.

Data: LLaVA's ``mm-vet`` (``llava-mm-vet.jsonl``; ``mm-vet.json`` and ``images`` of mm-vet.zip), or the hub's
``lmms-lab/MMVet``, whose ids are ``v1_0`` where LLaVA's are 0, and whose capabilities are one string with commas; both
become LLaVA's. Prompt: the bare question, greedy (lmms-eval puts a chain of thought in front and samples: other
numbers). Metric: 100 times the sum of the grades over the number of items (218), for each capability and for each set
of capabilities too. Judge: gpt-4-0613, one row of a table with seven examples. Submission: ``{"v1_0": text, …}`` for
mm-vet_evaluator.py or the space MM-Vet_Evaluator, which call the model as the file is called.

Source: https://github.com/yuweihao/MM-Vet, mm-vet_evaluator.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava.storage.files import write_atomically

from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, read_questions
from ..reading.sources import need, read_json, refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table
from ..scoring.judge import Judge, marked
from ..scoring.matching import asked, match, unreadable
from ..scoring.mmvet_judge import Item, asked_again, grade_of, matches, request_of

JUDGE_MODEL = "gpt-4-0613"
_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")  # in the paper's order
_ITEMS = 218
_FATE = "have 0, as from the official tool"  # answers without a grade
_QUESTIONS, _ITEMS_FILE = "llava-mm-vet.jsonl", "mm-vet.json"


def questions_from_folder(folder: Path) -> list[Question]:
    """The questions of LLaVA's file; ids are numbers."""
    return read_questions(folder / _QUESTIONS, folder / "images")


def questions_from_tables(tables: Tables) -> list[Question]:
    """The questions of the hub's table, with LLaVA's ids."""
    rows = tables["test"]
    ids = [_number(name, rows.name) for name in rows.column("question_id")]
    refuse_repeated(ids, rows.name)
    texts = rows.column("question")
    return [
        Question(id_, text, (rows.picture(place),)) for place, (id_, text) in enumerate(zip(ids, texts, strict=True))
    ]


def _number(name: str, where: str) -> int:
    try:
        return int(name.removeprefix("v1_"))
    except ValueError:
        raise ValueError(f"{where} has the question_id {name!r}, where v1_ and a number are expected") from None


def truth_from_folder(folder: Path) -> dict[str, Item]:
    """The items of ``mm-vet.json`` by their names, ``v1_0`` and so on."""
    path = folder / _ITEMS_FILE
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is {type(content).__name__}, not an object with an entry for each item: fetch it again"
        )
    items = {}
    for name, row in content.items():
        where = f"{name} in {path}"
        items[name] = Item(
            need(row, "question", where), need(row, "answer", where), tuple(need(row, "capability", where))
        )
    return items


def truth_from_tables(tables: Tables) -> dict[str, Item]:
    """The same, of the hub's table."""
    rows = tables["test"]
    columns = (rows.column(name) for name in ("question_id", "question", "answer", "capability"))
    return {
        f"v1_{_number(name, rows.name)}": Item(question, answer, tuple(one.strip() for one in capability.split(",")))
        for name, question, answer, capability in zip(*columns, strict=True)
    }


def score(answers: Sequence[Answer], truth: Mapping[str, Item], judge: Judge | None) -> Score:
    """Grades of the answers; an item without answer has none.

    An answer without a grade after as many replies as the judge gives (five) has 0, and the score says so. An answer
    whose image could not be read has 0, unasked.

    Raises:
        ValueError: there is no judge or no answer, the judge refuses, or no reply has a grade.
        OSError: the judge cannot be reached.
    """
    if judge is None:
        raise ValueError(f"mmvet needs a judge: --judge {JUDGE_MODEL}, or --judge exact for the offline proxy")
    matched = match(answers, truth, lambda answer: _name(answer.question_id))
    given = {name: matched.answers[name] for name in truth if name in matched.answers}
    asked = {name: answer.text for name, answer in given.items() if not unreadable(answer)}
    found: list[float | None]
    if judge.exact:
        found = [float(matches(text, truth[name].answer)) for name, text in asked.items()]
        metric = "offline proxy (--judge exact), not GPT-4's score: % of texts with the answer's words in them"
    else:
        requests = [request_of(truth[name], text) for name, text in asked.items()]
        found = judge.ask(requests, grade_of, asked_again)
        if found and found.count(None) == len(found):
            raise _without_grades(f"of the judge {judge.model}")
        metric = marked(f"score by the judge {judge.model}, 0 to 100", found.count(None), len(found), _FATE)
    by_name = dict.fromkeys(given, 0.0) | {name: grade or 0.0 for name, grade in zip(asked, found, strict=True)}
    result = _summary(
        {name: [grade] for name, grade in by_name.items()},
        {name: item.capabilities for name, item in truth.items()},
        len(truth),
        metric,
    )
    details = {
        "judge": judge.model,
        "protocol_judge": JUDGE_MODEL,
        **result.details,
        **matched.counts,
        "unjudged": found.count(None),
    }
    return replace(result, details=details, points=matched.in_order(by_name))


def graded(path: Path, data: Path | None) -> Score:
    """The score of a file that mm-vet_evaluator.py has graded, ``{"v1_0": {"model", "content", "score"}, …}``.

    Args:
        path: the file. ``score`` has a grade for each run of the judge; the result is the mean of those that all items
            have.
        data: LLaVA's folder; with its ``mm-vet.json`` there are scores of the capabilities. Without it there are 218
            items.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, of other items than those of ``mm-vet.json``, or no reply in it has a grade.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path} has no graded items: expected is {{"v1_0": {{"score": [0.5, …], …}}, …}}')
    grades = {name: _grades(row, f"{name} in {path}") for name, row in content.items()}
    items = truth_from_folder(data) if data is not None and (data / _ITEMS_FILE).is_file() else None
    if items is not None and (unknown := [name for name in grades if name not in items]):
        raise ValueError(f"{path} has grades of {', '.join(unknown[:3])}, which {data / _ITEMS_FILE} does not have")
    capabilities = {name: item.capabilities for name, item in items.items()} if items else None
    models = (row.get("model") or [] for row in content.values())
    judges = {one for named in models for one in ([named] if isinstance(named, str) else named)}
    judge = ", ".join(sorted(map(str, judges))) or None
    unread = [grade_of(reply) is None for row in content.values() for reply in _replies(row)]
    if unread and all(unread):
        raise _without_grades(f"in {path}")
    unjudged = sum(any(grade_of(reply) is None for reply in _replies(row)) for row in content.values())
    metric = f"score by {f'the judge {judge}' if judge else 'a graded file'}, 0 to 100"
    metric = marked(metric, unjudged, len(grades), _FATE)
    result = _summary(grades, capabilities, len(items) if items else _ITEMS, metric)
    details = {"judge": judge, "protocol_judge": JUDGE_MODEL, "unjudged": unjudged, **result.details}
    return replace(result, details=details)


def submit(answers: Sequence[Answer], truth: Any, folder: Path) -> Path:
    """Write the answers as the official evaluator reads them; name the file after the model."""
    path = folder / "mmvet.json"
    texts = {_name(answer.question_id): answer.text for answer in answers}
    write_atomically(path, json.dumps(texts, indent=2))
    return path


def _name(question_id: str | int) -> str:
    return f"v1_{str(question_id).removeprefix('v1_')}"


def _replies(row: Mapping[str, Any]) -> list[str]:
    """The judge's last reply in each of its runs; the official tool gives 0 where that has no grade."""
    replies = row.get("content")
    return [reply for reply in replies if isinstance(reply, str)] if isinstance(replies, list) else []


def _without_grades(where: str) -> ValueError:
    return ValueError(
        f"none of the replies {where} has a grade, a number from 0 to 1 at its beginning: have the answers graded "
        "again, by another judge"
    )


def _grades(row: Any, where: str) -> list[float]:
    grades = row.get("score") if isinstance(row, dict) else None
    if not isinstance(grades, list) or not grades:
        raise ValueError(f"{where} has no grades: grade it to the end with mm-vet_evaluator.py")
    for grade in grades:
        if not isinstance(grade, int | float) or not 0 <= grade <= 1:
            raise ValueError(f"{where} has the grade {grade!r}, where a number from 0 to 1 is expected")
    return grades


def _summary(
    grades: Mapping[str, Sequence[float]],
    capabilities: Mapping[str, Sequence[str]] | None,
    items: int,
    metric: str,
) -> Score:
    """The mean of the judge's runs, in total and of the items that need something.

    Args:
        grades: of each item, one for each run, in the order in which they are added up.
        capabilities: of each item, graded or not; None if that is not known.
        items: how many there are.
        metric: what the score is.
    """
    needs = capabilities or {}
    single = {name: tuple(set(needed)) for name, needed in needs.items()}
    together = {name: (_set_name(needed),) for name, needed in needs.items()}
    of_one, of_set = (Counter(group for groups in of.values() for group in groups) for of in (single, together))
    runs = min((len(of_item) for of_item in grades.values()), default=1)

    def shares(groups: Mapping[str, Sequence[str]], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
        sums = {group: np.zeros(runs) for group in counts}
        for name, of_item in grades.items():
            for group in groups.get(name, ()):
                sums[group] += of_item[:runs]
        return {group: of_group / counts[group] * 100 for group, of_group in sums.items()}  # official order of rounding

    total = shares(dict.fromkeys(grades, ("total",)), {"total": items})["total"]
    by_one = {name: float(values.mean()) for name, values in shares(single, of_one).items()}
    by_one = {name: by_one[name] for name in sorted(by_one, key=_place)}
    by_set = {name: float(values.mean()) for name, values in shares(together, of_set).items()}
    details = {
        "items": items,
        "missing": items - len(grades),
        "runs": total.tolist(),
        "std": float(total.std()),
        "capabilities": by_one,
        "capability_sets": {name: by_set[name] for name, _ in of_set.most_common()},
        "items_by_capability": {name: of_one[name] for name in by_one},
        "items_by_capability_set": dict(of_set.most_common()),
        "printed": {  # with the official tool's decimals
            **{name: _rounded(share) for name, share in by_one.items()},
            "total": _rounded(total.mean()),
            "std": _rounded(total.std()),
            "runs": [_rounded(share) for share in total],
        },
    }
    return Score(metric=metric, score=float(total.mean()), details=details, parts=by_one)


def _rounded(value: float) -> float:
    return float(np.round(value, 1))


def _place(capability: str) -> tuple[int, str]:
    known = capability in _CAPABILITIES
    return (_CAPABILITIES.index(capability) if known else len(_CAPABILITIES)), capability


def _set_name(capabilities: Sequence[str]) -> str:
    return "_".join(sorted(set(capabilities), key=_place))


_ZIP = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip: unzip it in playground/data/eval"

BENCHMARK = Benchmark(
    name="mmvet",
    title="MM-Vet",
    summary=f"218 open questions that need several capabilities (score from 0 to 100 by {JUDGE_MODEL})",
    folder="mm-vet",
    max_new_tokens=1024,
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File("images/", _ZIP, "run"),
        File(_ITEMS_FILE, _ZIP, "score"),
    ),
    tables={"test": Table("lmms-lab/MMVet", "test")},
    from_folder=questions_from_folder,
    truth_from_folder=truth_from_folder,
    score=score,
    from_tables=questions_from_tables,
    truth_from_tables=truth_from_tables,
    judged=True,
    graded=graded,
    submit=submit,
    missing="have a grade of 0",
    asked=partial(asked, name=lambda answer: _name(answer.question_id)),
)

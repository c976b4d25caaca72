"""LLaVA-Bench (in the wild): 60 open questions about 24 images; GPT-4 rates the answers beside text-only GPT-4's own.

Data: LLaVA's ``llava-bench-in-the-wild`` (questions, context, GPT-4's answers, images; a clone of the hub's
liuhaotian/llava-bench-in-the-wild), or the hub's ``lmms-lab/llava-bench-in-the-wild``, whose only split is called
train and which has an image for each question. Prompt: the bare question, greedy. Judge: gpt-4-0314 at temperature 0.2;
it sees a description of the image, GPT-4's answer as that of assistant 1, the model's as that of assistant 2, and gives
both 1 to 10. Metric: the model's mean over GPT-4's, each rounded to three digits, in percent, rounded to one. A review
whose first line is not two numbers counts as (-1, -1). The judge's noise is about two points: published numbers are
means of three runs. There is nothing that strings could be compared with, hence no proxy, and nothing to submit.

Source: LLaVA's eval_gpt_review_bench.py, table/rule.json and summarize_gpt_review.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..benchmark import Benchmark
from ..reading.sources import need, picture, read_jsonl, refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table
from ..scoring.judge import Judge, marked
from ..scoring.llavabench_judge import Item, rating_of, request_of
from ..scoring.matching import match, unreadable

JUDGE_MODEL = "gpt-4-0314"
_CATEGORIES = ("conv", "detail", "complex")
_PREFIX = "llava_bench_"  # of the categories in LLaVA's reviews
_NO_RATING = (-1.0, -1.0)
_UNREADABLE = (10.0, 0.0)  # of GPT-4's answer and of the model's, where the model could not be asked
_QUESTIONS, _CONTEXT, _REFERENCE = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"


def questions_from_folder(folder: Path) -> list[Question]:
    """The questions of LLaVA's file."""
    return [
        Question(row["question_id"], row["text"], (picture(folder / "images" / row["image"]),), row["category"])
        for row in _questions(folder / _QUESTIONS)
    ]


def _questions(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        for name in ("question_id", "text", "image", "category"):
            need(row, name, f"line {number} of {path}")
        _check_category(row["category"], f"line {number} of {path}")
    refuse_repeated((row["question_id"] for row in rows), str(path))
    return rows


def _check_category(category: str, where: str) -> None:
    if category not in _CATEGORIES:
        raise ValueError(f"{where} has the category {category!r}: known are {', '.join(_CATEGORIES)}")


def questions_from_tables(tables: Tables) -> list[Question]:
    """The questions of the hub's table."""
    rows = tables["train"]
    columns = [rows.column(name) for name in ("question_id", "question", "category")]
    refuse_repeated(columns[0], rows.name)
    return [
        Question(_as_in_files(id_), text, (rows.picture(place),), category)
        for place, (id_, text, category) in enumerate(zip(*columns, strict=True))
    ]


def _as_in_files(question_id: str | int) -> str | int:
    """LLaVA's ids are numbers; a table may have them as strings."""
    return int(question_id) if str(question_id).isdecimal() else question_id


def truth_from_folder(folder: Path) -> dict[str, Item]:
    """The items by their id, as a string."""
    captions = _by(folder / _CONTEXT, "image", "caption")
    references = _by(folder / _REFERENCE, "question_id", "text")
    items = {}
    for row in _questions(folder / _QUESTIONS):
        name = str(row["question_id"])
        context = need(captions, str(row["image"]), str(folder / _CONTEXT))
        reference = need(references, name, str(folder / _REFERENCE))
        items[name] = Item(row["text"], _joined(context), reference, row["category"])
    return items


def _by(path: Path, key: str, value: str) -> dict[str, Any]:
    rows = enumerate(read_jsonl(path), start=1)
    return {
        str(need(row, key, f"line {line} of {path}")): need(row, value, f"line {line} of {path}") for line, row in rows
    }


def _joined(caption: str | Sequence[str]) -> str:
    return caption if isinstance(caption, str) else "\n".join(caption)


def truth_from_tables(tables: Tables) -> dict[str, Item]:
    """The same, of the hub's table."""
    rows = tables["train"]
    names = ("question_id", "question", "caption", "gpt_answer", "category")
    items = {}
    for id_, question, caption, reference, category in zip(*(rows.column(name) for name in names), strict=True):
        _check_category(category, f"{rows.name}, question {id_},")
        items[str(id_)] = Item(question, _joined(caption), reference, category)
    return items


def score(answers: Sequence[Answer], truth: Mapping[str, Item], judge: Judge | None) -> Score:
    """Ratings of the answers that there are.

    A review without ratings is asked for again (the official tool asks once); at last it counts as there, (-1, -1), and
    the score says so. An answer whose image could not be read is not reviewed: it has 0, where GPT-4's has 10.

    Raises:
        ValueError: there is no judge or no answer, the judge is the proxy, it refuses, or no review has ratings.
        OSError: the judge cannot be reached.
    """
    if judge is None:
        raise ValueError(f"llavabench needs a judge: --judge {JUDGE_MODEL}")
    if judge.exact:
        raise ValueError(
            "llavabench has no answers to compare strings with, hence no --judge exact: name a language model, as in "
            f"--judge {JUDGE_MODEL}, or score a file of reviews with --graded"
        )
    matched = match(answers, truth)
    given = {name: matched.answers[name] for name in truth if name in matched.answers}
    asked = {name: answer.text for name, answer in given.items() if not unreadable(answer)}
    found = judge.ask([request_of(truth[name], text) for name, text in asked.items()], rating_of)
    ratings = dict.fromkeys(given, _UNREADABLE) | {
        name: rating or _NO_RATING for name, rating in zip(asked, found, strict=True)
    }
    reviews = [(truth[name].category, rating) for name, rating in ratings.items()]
    return _summary(reviews, judge.model, f"the judge {judge.model}", len(asked), matched.counts)


def graded(path: Path, data: Path | None = None) -> Score:
    """The score of a file of reviews, as summarize_gpt_review.py prints it.

    Args:
        path: jsonl with ``category`` (``llava_bench_conv`` …) and ``tuple``, the two ratings. Lines without category
            count for all only.
        data: not needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has no ratings, the ratings have no ratio, or all are those of reviews without any.
    """
    reviews = []
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"line {number} of {path}"
        category = str(row["category"]).removeprefix(_PREFIX) if "category" in row else None
        rating = need(row, "score" if category is None and "tuple" not in row else "tuple", where)
        if not isinstance(rating, list) or len(rating) != 2 or not all(isinstance(one, int | float) for one in rating):
            raise ValueError(f"{where} has the ratings {rating!r}, where two numbers are expected")
        reviews.append((category, (rating[0], rating[1])))
    return _summary(reviews, None, str(path), len(reviews), {})


def _summary(
    reviews: Sequence[tuple[str | None, tuple[float, float]]],
    model: str | None,
    source: str,
    judged: int,
    further: Mapping[str, Any],
) -> Score:
    """The official numbers of reviews (category and ratings), of which so many are a judge's, from some source."""
    if not reviews:
        raise ValueError("llavabench has no reviews to summarize: give the file that eval_gpt_review_bench.py wrote")
    categories = sorted({category for category, _ in reviews if category is not None})
    unjudged = sum(tuple(ratings) == _NO_RATING for _, ratings in reviews)
    if judged and unjudged == judged:
        raise ValueError(
            f"none of the {judged} reviews of {source} has ratings: two numbers with one blank between them are "
            "expected in its first line; have the answers reviewed again, by another judge"
        )
    groups = {
        "all": [ratings for _, ratings in reviews],
        **{name: [ratings for category, ratings in reviews if category == name] for name in categories},
    }
    printed = {name: _printed(name, ratings) for name, ratings in groups.items()}
    metric = f"rating relative to GPT-4's answers, by {f'the judge {model}' if model else 'a file of reviews'}, %"
    return Score(
        metric=marked(metric, unjudged, judged, "count as rated -1 and -1, as in LLaVA's script"),
        score=printed["all"]["relative"],
        details={
            "judge": model,
            "protocol_judge": JUDGE_MODEL,
            "reviews": len(reviews),
            "unjudged": unjudged,
            **further,
            "categories": printed,
        },
        parts={
            name: values["relative"]
            for name, values in printed.items()
            if name != "all" and values["relative"] is not None
        },
    )


def _printed(name: str, ratings: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """The three numbers that the official tool prints of some reviews: the ratio, and ten times either mean.

    Where no review has ratings there is no ratio (it would be that of -1 to -1, 100 %).
    """
    of_reference, of_model = (round(mean, 3) for mean in np.asarray(ratings).mean(0).tolist())
    if of_reference == 0:
        raise ValueError(f"the reviews of {name!r} rate GPT-4's answers 0 on average: nothing can be relative to that")
    return {
        "relative": None if {*map(tuple, ratings)} == {_NO_RATING} else round(of_model / of_reference * 100, 1),
        "gpt4": round(of_reference * 10, 1),
        "model": round(of_model * 10, 1),
        "reviews": len(ratings),
    }


_HUB = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild: put its content here"

BENCHMARK = Benchmark(
    name="llavabench",
    title="LLaVA-Bench",
    summary=f"60 open questions in the wild (rating relative to GPT-4's answers, by {JUDGE_MODEL})",
    folder="llava-bench-in-the-wild",
    max_new_tokens=1024,
    files=(
        File(_QUESTIONS, _HUB),
        File("images/", _HUB, "run"),
        File(_CONTEXT, _HUB, "score"),
        File(_REFERENCE, _HUB, "score"),
    ),
    tables={"train": Table("lmms-lab/llava-bench-in-the-wild", "train")},
    from_folder=questions_from_folder,
    truth_from_folder=truth_from_folder,
    score=score,
    from_tables=questions_from_tables,
    truth_from_tables=truth_from_tables,
    judged=True,
    proxy=False,
    graded=graded,
)

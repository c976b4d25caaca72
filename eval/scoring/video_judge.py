"""Answers about videos, judged and scored as Video-LLaVA does it: does a prediction mean the same as the answer?

GPT-3.5 says so; the accuracy is the share of "yes". Source: Video-LLaVA, ``videollava/eval/video/eval_video_qa.py``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reading.sources import read_json
from ..records import Answer, Score
from .judge import marked
from .matching import match, unreadable
from .proxy import normalized_match
from .replies import Request

if TYPE_CHECKING:
    from .judge import Judge

_NAMED = 5  # ids and videos that details name; of the others they only have the number

_SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for question-answer "
    "pairs. Your task is to compare the predicted answer with the correct answer and determine if they match "
    "meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - Focus on the meaningful match "
    "between the predicted answer and the correct answer.\n- Consider synonyms or paraphrases as valid matches.\n"
    "- Evaluate the correctness of the prediction compared to the answer."
)
_INSTRUCTION = (
    "Provide your evaluation only as a yes/no and score where the score is an integer value between 0 and 5, with 5 "
    "indicating the highest meaningful match. Please generate the response in the form of a Python dictionary string "
    "with keys 'pred' and 'score', where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' is in "
    "INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary "
    "string. For example, your response should look like this: {'pred': 'yes', 'score': 4.8}."
)


@dataclass(frozen=True)
class Item:
    """A question about a video, with its answer.

    Attributes:
        id: ``question_id``, of the data's own type.
        video: name of the video, without extension.
        question: as the data has it.
        answer: one or two words.
        kind: type of the question: a number, as text.
    """

    id: str | int
    video: str
    question: str
    answer: str
    kind: str = "default"


@dataclass(frozen=True)
class Verdict:
    """What the judge thinks of a prediction.

    Attributes:
        yes: whether it is right; None where the judge's dictionary says neither "yes" nor "no".
        score: 0 to 5; 0 where the dictionary has no number.
    """

    yes: bool | None
    score: int


def judge_request(item: Item, prediction: str) -> Request:
    """What Video-LLaVA sends to ``gpt-3.5-turbo``: two messages, and no temperature (the API's default is 1)."""
    pair = f"Question: {item.question}\nCorrect Answer: {item.answer}\nPredicted Answer: {prediction}"
    asked = f"Please evaluate the following video-based question-answer pair:\n\n{pair}\n\n{_INSTRUCTION}"
    return Request(({"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}))


def parse_verdict(reply: str) -> Verdict | None:
    """The verdict in a judge's reply; None where it is no Python literal: the official tool then asks again."""
    try:
        content = ast.literal_eval(reply)
        json.dumps(content)  # in a file of this form the official tool keeps it
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return verdict_of(content)


def verdict_of(content: Any) -> Verdict:
    """The verdict in a judge's dictionary ``{"pred": "yes", "score": 4}``, with the official tool's tolerance.

    ``int(score)``, so that 4.8 is 4; "yes" anywhere in pred, then "no". Without a number pred does not count either.
    """
    try:
        score = int(content["score"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return Verdict(None, 0)
    pred = content.get("pred")
    said = pred.lower() if isinstance(pred, str) else ""
    return Verdict(True if "yes" in said else False if "no" in said else None, score)


def says_yes_or_no(verdict: Verdict) -> bool:
    """Whether a verdict is in the accuracy."""
    return verdict.yes is not None


def accuracy(verdicts: Iterable[Verdict]) -> float | None:
    """Percent of "yes" among "yes" and "no"; None where there is neither."""
    said = [verdict.yes for verdict in verdicts if verdict.yes is not None]
    return 100 * sum(said) / len(said) if said else None


def average_score(verdicts: Sequence[Verdict]) -> float | None:
    """Mean of all scores, 0 to 5; None where there are none."""
    return sum(verdict.score for verdict in verdicts) / len(verdicts) if verdicts else None


def _verdicts(answers: Mapping[str, Answer], truth: Mapping[str, Item], judge: Judge) -> dict[str, Verdict]:
    """What the judge, or its proxy, says about some answers, by their names; without those it says nothing about."""
    if judge.exact:
        right = {name: normalized_match(answer.text, truth[name].answer) for name, answer in answers.items()}
        return {name: Verdict(yes, 5 * yes) for name, yes in right.items()}
    requests = [judge_request(truth[name], answer.text) for name, answer in answers.items()]
    judged = judge.ask(requests, parse_verdict, None, says_yes_or_no)
    return {name: verdict for name, verdict in zip(answers, judged, strict=True) if verdict is not None}


def score(
    answers: Sequence[Answer], truth: Mapping[str, Item], judge: Judge | None, kinds: Mapping[str, str] | None = None
) -> Score:
    """Accuracy in percent, as ``eval_video_qa.py`` prints it (there as a fraction).

    As there: each id counts once, the last answer to it; answers whose verdict is neither yes nor no, or that the judge
    gave none about, are not in the accuracy (which says so then); nor are questions without an answer. Other than
    there: the judge is asked again about these, as often as it is about others without a verdict; and an answer whose
    video could not be read is wrong, with score 0.

    Args:
        answers: in any order.
        truth: by id, as text.
        judge: see :mod:`eval.scoring.judge`.
        kinds: names of the types of questions.

    Raises:
        ValueError: there is nothing to score, or no verdict that says yes or no.
    """
    if judge is None:
        raise ValueError("open answers about videos need a judge: give --judge, a model's name or exact")
    matched = match(answers, truth)
    known = matched.answers
    broken = [name for name, answer in known.items() if unreadable(answer)]
    asked = [name for name in known if name not in set(broken)]
    found = _verdicts({name: known[name] for name in asked}, truth, judge)
    verdicts = found | {name: Verdict(False, 0) for name in broken}
    left_out = [name for name in asked if name not in found or not says_yes_or_no(found[name])]
    if asked and len(left_out) == len(asked):
        raise ValueError(
            f"there is nothing to score: of {len(truth)} questions {len(known)} have an answer, and none of those a "
            f"verdict of the judge {judge.model} that says yes or no; name another --judge"
        )
    by_kind: dict[str, list[Verdict]] = {}
    for name, verdict in verdicts.items():
        by_kind.setdefault(truth[name].kind, []).append(verdict)
    kinds = kinds or {}
    types = {kinds.get(kind, kind): by_kind[kind] for kind in sorted(by_kind)}
    videos = list(dict.fromkeys(truth[name].video for name in broken))
    points = {name: float(verdict.yes) for name, verdict in verdicts.items() if verdict.yes is not None}
    details = {
        "judge": judge.model,
        **_counts(list(verdicts.values())),
        "average_score": None if judge.exact else average_score(list(verdicts.values())),
        "types": {name: {"accuracy": accuracy(some), "questions": len(some)} for name, some in types.items()},
        "unreadable_videos": len(videos),
        "unreadable_video_names": videos[:_NAMED],
        "accuracy_without_unreadable_videos": accuracy(found.values()),
        "unjudged": len(left_out),
        "unjudged_ids": left_out[:_NAMED],
        **matched.counts,
        "answers_with_another_truth": sum(
            str(answer.extra["answer"]) != truth[name].answer
            for name, answer in known.items()
            if "answer" in answer.extra
        ),
    }
    named = {name: accuracy(some) for name, some in types.items() if name in kinds.values()}
    by = "exact match, an offline proxy for a judge" if judge.exact else f"judged by {judge.model}"
    return Score(
        _marked(f"accuracy ({by})", len(left_out), len(asked)),
        accuracy(verdicts.values()),
        details,
        {name: value for name, value in named.items() if value is not None},
        [points[name] for name in matched.ids] if len(points) == len(answers) else None,
    )


def graded(path: Path, folder: Path | None = None) -> Score:
    """The score of the file that ``eval_video_qa.py`` writes: ``{id: [{"pred", "score"}, {"q", "a", "pred"}]}``.

    Args:
        path: the file (``--output_json`` there).
        folder: not needed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or nothing in it says yes or no.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(entry, list) and entry for entry in content.values()):
        raise ValueError(f"{path} is not a graded file: {{id: [{{'pred', 'score'}}, {{'q', 'a', 'pred'}}]}}")
    verdicts = [verdict_of(entry[0]) for entry in content.values()]
    headline = accuracy(verdicts)
    if headline is None:
        raise ValueError(f"{path} has no verdict that says yes or no: judge the answers again")
    said = [verdict.yes for verdict in verdicts]
    unjudged = said.count(None)
    details = {**_counts(verdicts), "unjudged": unjudged, "average_score": average_score(verdicts)}
    metric = _marked("accuracy (graded)", unjudged, len(said))
    return Score(metric, headline, details, {}, None if unjudged else [float(yes) for yes in said])


def _marked(metric: str, unjudged: int, answers: int) -> str:
    return marked(metric, unjudged, answers, "are left out, as in Video-LLaVA's script")


def _counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    said = [verdict.yes for verdict in verdicts]
    return {"scored": len(said), "yes": said.count(True), "no": said.count(False), "neither": said.count(None)}

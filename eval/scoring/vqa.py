"""Open answers of a word or a phrase: how they are normalised and compared with ten people's (VQA accuracy)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava.storage.files import write_atomically

from ..records import Score
from .matching import Id, Matched, percent, unreadable

HUMANS = 10  # answers to each question

Accuracy = Callable[[str, Sequence[str]], float]

# Normalisation: what EvalAI's server does to answers, and what LLaVA does before it uploads them.

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The official code hands re.UNICODE over where `count` belongs: no more full stops than this go.
_FULL_STOPS = int(re.UNICODE)
_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_PLAIN_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
    I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
"""
_OTHER_CONTRACTIONS = """
    couldn'tve couldnt've couldn't've | hadnt've hadn'tve hadn't've | hed've he'dve he'd've | Id've I'dve I'd've |
    itd've it'dve it'd've | let's let's | mightnt've mightn'tve mightn't've | ow's'at 'ows'at 'ow'sat 'ow's'at |
    shed've she'dve she'd've | she's she's | shouldnt've shouldn'tve shouldn't've | somebody'd somebodyd |
    somebodyd've somebody'dve somebody'd've | someoned've someone'dve someone'd've |
    somethingd've something'dve something'd've | thered've there'dve there'd've | theyd've they'dve they'd've |
    wed've we'dve we'd've | whod've who'dve who'd've | wouldnt've wouldn'tve wouldn't've | yall'll y'allll y'all'll |
    yall'd've y'alld've y'all'dve y'all'd've | youd've you'dve you'd've
"""  # in each group the last word is what the others become
CONTRACTIONS: dict[str, str] = {word.replace("'", ""): word for word in _PLAIN_CONTRACTIONS.split()} | {
    word: group[-1] for group in map(str.split, _OTHER_CONTRACTIONS.split("|")) for word in group[:-1]
}


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """An answer as LLaVA uploads it: lower case, without punctuation and articles, numbers as digits.

    Source: ``EvalAIAnswerProcessor`` in LLaVA's ``llava/eval/m4c_evaluator.py``, with all that it does oddly.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_on_server(text.strip())


@lru_cache(maxsize=1 << 16)
def normalise_on_server(text: str) -> str:
    """An answer as the VQA server compares it: :func:`normalise` without its first step.

    Source: ``vqaEval.py`` of the official VQA tools.
    """
    text = _one_line(text)
    kept = text
    for mark in _PUNCTUATION:  # the conditions are about the whole text, not about what is left of it
        dropped = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        kept = kept.replace(mark, "" if dropped else " ")
    kept = _FULL_STOP.sub("", kept, count=_FULL_STOPS)
    words = (_NUMBERS.get(word, word) for word in kept.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


# Accuracy of one answer, 0 to 1. The three variants give different numbers for the same answers.


def soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """VQA accuracy: min(1, people who agree / 3), averaged over leaving out each person.

    Args:
        answer: the model's, normalised.
        humans: the people's, normalised.

    Returns:
        0.3, 0.6, 0.9 and 1 where 1, 2, 3 and more of ten people gave that answer.
    """
    agree = [human == answer for human in humans]
    number = sum(agree)
    return sum(min(1, (number - own) / 3) for own in agree) / len(agree)


def textvqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Both sides normalised as LLaVA does (``TextVQAAccuracyEvaluator``; lmms-eval does the same for TextVQA)."""
    return soft_accuracy(normalise(answer), [normalise(human) for human in humans])


def server_accuracy(answer: str, humans: Sequence[str]) -> float:
    """As the official VQA tool has it: where all people say the same, nothing is normalised, not even case."""
    answer, humans = _one_line(answer), [_one_line(human) for human in humans]
    if len(set(humans)) > 1:
        answer, humans = normalise_on_server(answer), [normalise_on_server(human) for human in humans]
    return soft_accuracy(answer, humans)


def uploaded_accuracy(answer: str, humans: Sequence[str]) -> float:
    """What the server makes of an answer that LLaVA uploads: normalised before, then :func:`server_accuracy`."""
    return server_accuracy(normalise(answer), humans)


def lmms_accuracy(answer: str, humans: Sequence[str]) -> float:
    """As lmms-eval's ``vqav2_val`` has it: both sides normalised as on the server, always."""
    return soft_accuracy(normalise_on_server(answer), [normalise_on_server(human) for human in humans])


# The score of a set.


@dataclass(frozen=True)
class Annotation:
    """What people answered to a question.

    Attributes:
        humans: ten answers, as they typed them.
        kind: of answer (``yes/no``, ``number``, ``other``, …).
    """

    humans: tuple[str, ...]
    kind: str = "other"


def ten(answers: Iterable[str], where: str) -> tuple[str, ...]:
    """The people's answers to a question.

    Raises:
        ValueError: they are not ten; the official tools refuse that too. ``where`` names the question.
    """
    answers = tuple(answers)
    if len(answers) != HUMANS:
        raise ValueError(f"{where} has {len(answers)} people's answers, not {HUMANS}: fetch the data again")
    return answers


def score_uploaded(matched: Matched[Id], annotations: Mapping[Id, Annotation], metric: str) -> Score:
    """What the server gives for LLaVA's submission: a question without an answer has the empty one.

    The details have each kind of answer, and the accuracy in the two other variants that are in use: of the answers as
    they are, without LLaVA's normalisation, and lmms-eval's.
    """
    texts = {name: matched.answers[name].text if name in matched.answers else "" for name in annotations}
    wrong = {name for name, answer in matched.answers.items() if unreadable(answer)}

    def points_by(accuracy: Accuracy) -> dict[Id, float]:
        return {
            name: 0.0 if name in wrong else accuracy(texts[name], annotation.humans)
            for name, annotation in annotations.items()
        }

    points = points_by(uploaded_accuracy)
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, annotation in annotations.items():
        kinds[annotation.kind].append(points[name])
    parts = {kind: percent(kinds[kind]) for kind in sorted(kinds)}
    details = {
        **matched.counts,
        "by_answer_type": {kind: {"accuracy": parts[kind], "questions": len(kinds[kind])} for kind in parts},
        "other_variants": {
            "official tool, answers as they are": percent(points_by(server_accuracy).values()),
            "lmms-eval": percent(points_by(lmms_accuracy).values()),
        },
    }
    return Score(metric, percent(points.values()), details, parts, matched.in_order(points))


def write_submission(entries: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a json list as LLaVA's converters do, byte for byte."""
    write_atomically(path, json.dumps(list(entries)))
    return path

"""How an answer of MMMU is read: the letter that it chooses, or what an open one may mean.

Source: MMMU's ``eval_utils.py``, rule by rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses; None where the official parser draws one at random.

    Of the letters in brackets, else those with a blank on either side, else (in more than five words) the options
    whose text is in the answer: the one that comes last. Source: ``parse_multi_choice_response`` of MMMU's
    ``eval_utils.py``.

    Args:
        text: the answer.
        options: the question's, by letter.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        places = {name: text.rfind(form.format(name)) for name in options}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) > 5:
        places = {name: text.lower().rfind(option.lower()) for name, option in options.items()}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    return None


# A number is one with thousands' commas, in scientific notation, or a plain one: in this order, each in its own pass.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def _normalised(text: str) -> list[str | float]:
    """A number, rounded to two places, or a text in lower case; single characters only match beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def open_candidates(text: str) -> list[str | float]:
    """What an open answer may mean: texts and numbers, in the form in which they are compared.

    Of each line, the shortest end after one of the words that announce an answer (in the last one after ``=``, too);
    if no line has any, all of it. And the numbers in these. Source: ``parse_open_response`` of MMMU's
    ``eval_utils.py``.
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")  # the official tool would split before capitals, too, but there are none any more
    said = []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for cue in (*_CUES, "=") if number == len(lines) else _CUES:
            end = line.split(cue)[-1].strip()
            # An end that is empty gives way to the next, however long that is.
            if cue in line and (not shortest or len(end) < len(shortest)):
                shortest = end
        if shortest and shortest not in {*":,.!?;'"}:
            said.append(shortest)
    said = said or [text]
    numbers = [number for each in said for pattern in _NUMBERS for number in pattern.findall(each)]
    return [form for each in (*said, *numbers) for form in _normalised(each)]


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether an open answer has one of the right ones: as a part of a text, or as an equal number.

    Source: ``eval_open`` of MMMU's ``eval_utils.py``.
    """
    right = [form for answer in answers for form in _normalised(answer)]
    return any(
        any(isinstance(form, str) and form in candidate for form in right)
        if isinstance(candidate, str)
        else candidate in right
        for candidate in open_candidates(text)
    )

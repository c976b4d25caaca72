"""The strings' comparison that stands in for a judge."""

from __future__ import annotations

import re

_ARTICLES = {"a", "an", "the"}
_WORDS = re.compile(r"(?<!\w)-?\d+(?:\.\d+)*(?!\w)|[^\W_]+")


def normalized_match(prediction: str, answer: str) -> bool:
    """Whether a model's words have the answer in them: the deterministic proxy for a judge of short answers.

    Both are lowercased and lose punctuation (but for a number's sign and point) and articles; then they are equal, or
    the answer's words follow each other somewhere in the prediction. Our own, no benchmark's: compare only with itself.
    """
    said, wanted = _words(prediction), _words(answer)
    if not wanted:  # nothing but punctuation or an article
        return prediction.strip().lower() == answer.strip().lower()
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


def _words(text: str) -> list[str]:
    text = re.sub(r"['\u2019]|(?<=\d),(?=\d{3})", "", text.lower())
    return [word for word in _WORDS.findall(text) if word not in _ARTICLES]

"""How GPT-4 is asked to rate an answer of LLaVA-Bench beside its own, and how its review is read.

Source: LLaVA's eval_gpt_review_bench.py and table/rule.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .replies import Request

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)


@dataclass(frozen=True)
class Item:
    """What the judge sees beside the model's answer.

    Attributes:
        question: as it was asked.
        context: a description of the image.
        reference: GPT-4's answer.
        category: ``conv``, ``detail`` or ``complex``.
    """

    question: str
    context: str
    reference: str
    category: str


def request_of(item: Item, text: str) -> Request:
    """What the judge is asked about an answer."""
    content = (
        f"[Context]\n{item.context}\n\n"
        f"[Question]\n{item.question}\n\n"
        f"[Assistant 1]\n{item.reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{RULE}\n\n"
    )
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": content})
    return Request(messages, temperature=0.2, max_tokens=1024)


def rating_of(review: str) -> tuple[float, float] | None:
    """The two numbers in a review's first line; None if it is anything else, even with one blank too many."""
    numbers = review.split("\n", maxsplit=1)[0].replace(",", " ").split(" ")
    if len(numbers) != 2:
        return None
    try:
        of_reference, of_model = float(numbers[0]), float(numbers[1])
    except ValueError:
        return None
    return (of_reference, of_model) if math.isfinite(of_reference) and math.isfinite(of_model) else None

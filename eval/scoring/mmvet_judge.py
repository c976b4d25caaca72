"""How GPT-4 is asked to grade an answer of MM-Vet, and how its reply is read; and the proxy for it.

Source: https://github.com/yuweihao/MM-Vet, mm-vet_evaluator.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .proxy import normalized_match
from .replies import Request

_EQUATION = "What is x in the equation? | -1 <AND> -5"
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes."
)
PROMPT = "\n".join(
    [
        "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> "
        "in the ground truth means it is totally right only when all elements in the ground truth are present in the "
        "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
        "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
        "(totally right). Just complete the last space of the correctness score.",
        "",
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        f"{_EQUATION} | x = 3 | 0.0",
        f"{_EQUATION} | x = -1 | 0.5",
        f"{_EQUATION} | x = -5 | 0.5",
        f"{_EQUATION} | x = -5 or 5 | 0.5",
        f"{_EQUATION} | x = -1 or x = -5 | 1.0",
        f"{_MEME} | The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is "
        "not very icy and Greenland isn't very green. | 0.4",
        f"{_MEME} | The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. "
        "Iceland, despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The "
        "text 'This is why I have trust issues' is a playful way to suggest that these contradictions can lead to "
        "distrust or confusion. The humor in this meme is derived from the unexpected contrast between the names of "
        "the countries and their actual physical characteristics. | 1.0",
        "",
    ]
)
_ONCE_MORE = "\nPredict the correctness of the answer (digit): "


@dataclass(frozen=True)
class Item:
    """What an answer is compared with.

    Attributes:
        question: as it was asked.
        answer: the ground truth, with ``<AND>`` and ``<OR>`` between its elements.
        capabilities: that the question needs.
    """

    question: str
    answer: str
    capabilities: tuple[str, ...]


def request_of(item: Item, text: str) -> Request:
    """What the judge is asked about an answer."""
    wanted = item.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    content = f"{PROMPT}\n{item.question} | {wanted} | {text} | "
    return Request(({"role": "user", "content": content},), temperature=0.0, max_tokens=3)


def asked_again(request: Request, attempt: int) -> Request:
    """The request after a reply without a grade: its end says what is wanted, and from the third time on it is warmer.

    The official tool raises the temperature after it has asked again, not before: 0, 0, 0.5, 1, 1.5, where it ends.
    """
    (message,) = request.messages
    return replace(
        request,
        messages=({**message, "content": message["content"] + _ONCE_MORE},),
        temperature=min(0.5 * (attempt - 1), 1.5),
    )


def grade_of(reply: str) -> float | None:
    """The grade that a reply begins with; None if it does not."""
    try:
        grade = float(reply.split(" ", maxsplit=1)[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def matches(text: str, answer: str) -> bool:
    """The proxy for the judge: any alternative of the ground truth, with all its elements, is in the answer."""
    return any(
        all(normalized_match(text, element) for element in alternative.split("<AND>"))
        for alternative in answer.split("<OR>")
    )

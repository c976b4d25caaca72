"""VQA whose test set only a server scores (VQAv2, VizWiz): answers to the validation set are scored here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..reading.sources import need
from ..records import Answer, Score, ScoredByServerError
from .matching import asked, match
from .vqa import Annotation, score_uploaded, ten

Name = Callable[[Answer], Any]  # of the question that an answer is to, as the annotations have it


def own_id(answer: Answer) -> int | str:
    """The question's id as the answers file has it."""
    return answer.question_id


@dataclass(frozen=True)
class Server:
    """Who scores the test set, and from what.

    Attributes:
        test: the test set, in words.
        file: the submission's name.
        place: where to upload it.
        annotations: the official file of people's answers to the validation set, with which this scores by itself.
    """

    test: str
    file: str
    place: str
    annotations: str


@dataclass(frozen=True)
class Truth:
    """What there is to score with.

    Attributes:
        test: what the submission has an entry for, in its order; empty with the validation set alone.
        annotations: people's answers to the validation set, by the question's name; empty with the test set alone.
    """

    test: Collection[Any]
    annotations: Mapping[Any, Annotation]

    def annotated(self, answers: Sequence[Answer], name: Name = own_id) -> bool:
        """Whether there are answers to the validation set among these."""
        given = {str(name(answer)) for answer in answers}
        return any(str(one) in given for one in self.annotations)

    def asked(self, answers: Sequence[Answer], name: Name = own_id) -> Truth:
        """The annotations that some answers are to; what a server scores stays as it is."""
        if not self.annotated(answers, name):
            return self
        return replace(self, annotations=asked(answers, self.annotations, name))


def annotation_of(row: Mapping[str, Any], where: str) -> Annotation:
    """What people answered, of a row of the official file: ``answers``, each with ``answer``, and ``answer_type``."""
    humans = ten((need(human, "answer", where) for human in need(row, "answers", where)), where)
    return Annotation(humans, row.get("answer_type") or "other")


def score_validation(answers: Sequence[Answer], truth: Truth, server: Server, name: Name = own_id) -> Score:
    """VQA accuracy of answers to the validation set, in percent, with that of each type of answer.

    Args:
        answers: in any order.
        truth: with annotations.
        server: of the test set, for what is said about answers to that.
        name: see :data:`Name`.

    Raises:
        ScoredByServerError: they are answers to the test set.
    """
    if truth.test and not truth.annotated(answers, name):
        raise ScoredByServerError(
            f"people's answers to {server.test} are not public: EvalAI scores them. Upload the submission file, "
            f"{server.file} in the folder of the results, to {server.place}. Answers to the validation set are scored "
            f"here, with {server.annotations} in the data's folder"
        )
    return score_uploaded(match(answers, truth.annotations, name), truth.annotations, "VQA accuracy (validation), %")

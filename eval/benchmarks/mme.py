"""MME: two yes/no questions about each of 1187 images, in ten subtasks of perception and four of cognition.

Data: LLaVA's ``llava_mme.jsonl`` with the images and question files of ``MME_Benchmark_release_version``, or
``lmms-lab/MME`` on the hub, whose ids may lack the ``images/`` of LLaVA's. Prompt: the question without "Please answer
yes or no." and LLaVA's request for a single word. An id is that of an image: two questions have it.

Right answers are found as LLaVA's ``convert_answer_to_mme.py`` does, by category, image and the text of the question,
with one blank or with two before "Please answer yes or no."; they come from the question files, or where those are
missing from the official tool's ``eval_tool/Your_Results``.

Metric: the official ``calculation.py``. A subtask's score is its accuracy in percent plus its accuracy+ (images with
both answers right) in percent. Perception is the sum of ten, cognition of four, and the headline the sum of the two:
VisionZip's number (LLaVA's is perception alone). An answer is yes or no if its first four characters, in lower case,
hold that word (yes goes first), else it is neither, which is wrong. The two answers about an image are found by their
id rather than by being neighbours, which is the same for a complete file in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .. import COMMAND
from ..benchmark import Benchmark
from ..reading.questions import EVAL_ZIP, SHORT_ANSWER, read_questions
from ..reading.sources import refuse_repeated
from ..reading.tables import Tables
from ..records import Answer, File, Question, Score, Table, Visual
from ..scoring.matching import asked, match

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_YES_OR_NO = "Please answer yes or no."
_QUESTIONS = "llava_mme.jsonl"
_RELEASE = "MME_Benchmark_release_version"
_RESULTS = "eval_tool/Your_Results"
_OFFICIAL = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"

Key = tuple[str, str, str]  # category, image without its suffix, question with "Please answer yes or no."


def from_folder(folder: Path) -> list[Question]:
    """The questions of ``llava_mme.jsonl``, about images in ``MME_Benchmark_release_version``."""
    path = folder / _QUESTIONS
    questions = read_questions(path, folder / _RELEASE, repeated=True)
    refuse_repeated(((question.id, question.text) for question in questions), str(path))
    return questions


def from_tables(tables: Tables) -> list[Question]:
    """The hub's questions, worded as LLaVA's; the two about an image share it."""
    rows = tables["test"]
    questions, images = [], dict[str, Visual]()
    for index, (name, text) in enumerate(zip(rows.column("question_id"), rows.column("question"), strict=True)):
        image = images.setdefault(name, rows.picture(index))
        short = text.replace(_YES_OR_NO, "").strip()
        questions.append(Question(name, short + SHORT_ANSWER, (image,), _place(name)[0]))
    return questions


def truth_from_folder(folder: Path) -> dict[Key, str]:
    """Right answers, ``yes`` or ``no``, from the question files or else the official tool's result files.

    Both may lie in the folder itself or in ``MME_Benchmark_release_version``, whose archive has them a level deeper
    in some versions; other files there are passed over.

    Raises:
        FileNotFoundError: there are neither.
        ValueError: a line is not as it should be.
    """
    places = [folder / _RELEASE, folder / _RELEASE / "MME_Benchmark", folder, folder / "MME_Benchmark"]
    truth: dict[Key, str] = {}
    for place in places:
        for category in PERCEPTION + COGNITION:
            for pattern in ("*.txt", "questions_answers_YN/*.txt"):
                for path in sorted((place / category).glob(pattern)):
                    for where, (question, answer, *_) in _fields(path, 2):
                        truth[category, _stem(path.name), question] = _yes_or_no(answer, where)
        if truth:
            return truth
    for place in places:
        for category in PERCEPTION + COGNITION:
            if (path := place / _RESULTS / f"{category}.txt").is_file():
                for where, (image, question, answer, *_) in _fields(path, 3):
                    truth[category, _stem(image), question] = _yes_or_no(answer, where)
        if truth:
            return truth
    raise FileNotFoundError(
        f"{folder} has no right answers: neither {_RELEASE}/CATEGORY/questions_answers_YN/*.txt (CATEGORY/*.txt for "
        f"some) nor {_RESULTS}/*.txt; `{COMMAND} prepare mme` says where they come from"
    )


def truth_from_tables(tables: Tables) -> dict[Key, str]:
    """The hub's right answers."""
    rows = tables["test"]
    columns = [rows.column(name) for name in ("question_id", "question", "answer")]
    return {
        (*_place(name), question.strip()): _yes_or_no(answer, f"{rows.name}, {name}")
        for name, question, answer in zip(*columns, strict=True)
    }


def _fields(path: Path, least: int) -> Iterator[tuple[str, list[str]]]:
    """The fields of each line, which tabs part, with the line's place for messages."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): fetch it again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.strip().split("\t")
        if len(fields) < least:
            raise ValueError(f"line {number} of {path} has {len(fields)} fields, not {least} with tabs between them")
        yield f"line {number} of {path}", fields


def _yes_or_no(answer: str, where: str) -> str:
    if answer.lower().strip() not in ("yes", "no"):
        raise ValueError(f"the right answer in {where} is {answer!r}, neither Yes nor No: fetch it again")
    return answer.lower().strip()


def _place(name: str) -> tuple[str, str]:
    """Category and image (without its suffix) of an id: CATEGORY/[images/]IMAGE."""
    return name.split("/", maxsplit=1)[0], _stem(name.rsplit("/", maxsplit=1)[-1])


def _stem(file: str) -> str:
    return file.split(".", maxsplit=1)[0]


def _find(answer: Answer, truth: Mapping[Key, str]) -> Key | None:
    """The question that an answer is to, None if there is no such one."""
    text = answer.prompt
    if (short := SHORT_ANSWER.strip()) in text:
        text = text.replace(short, "").strip()
    if _YES_OR_NO not in text:
        text = f"{text} {_YES_OR_NO}"
    place = _place(str(answer.question_id))
    for blanks in (" ", "  "):
        key = (*place, text.replace(f" {_YES_OR_NO}", blanks + _YES_OR_NO))
        if key in truth:
            return key
    return None


def read_answer(text: str) -> str:
    """``yes``, ``no`` or ``other``, from an answer's first four characters. Source: the official ``calculation.py``."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(answers: Sequence[Answer], truth: Mapping[Key, str], judge: object = None) -> Score:
    """Perception plus cognition, in points (at most 2800).

    Missing answers do not count for accuracy, nor images that lack one for accuracy+. Answers with line breaks or tabs,
    which would misplace those after them in the official tool's files, are counted and read like others.

    Raises:
        ValueError: no answer is to a question of MME.
    """
    matched = match(answers, truth, lambda answer: _find(answer, truth))
    images: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for key, answer in zip(matched.ids, answers, strict=True):
        if key is not None:
            images.setdefault(key[0], {}).setdefault(key[1], []).append((truth[key], read_answer(answer.text)))
    subtasks = {name: _figures(images[name]) for name in PERCEPTION + COGNITION if name in images}
    perception, cognition = (
        sum(subtasks[name]["score"] for name in names if name in subtasks) for names in (PERCEPTION, COGNITION)
    )
    return Score(
        metric="perception + cognition: accuracy and accuracy+ in percent, summed over 14 subtasks",
        score=perception + cognition,
        details={
            "perception": perception,
            "cognition": cognition,
            "subtasks": subtasks,
            "neither_yes_nor_no": sum(figures["other"] for figures in subtasks.values()),
            "line_breaks_or_tabs": sum("\n" in answer.text or "\t" in answer.text for answer in answers),
            **matched.counts,
            "missing_subtasks": [name for name in PERCEPTION + COGNITION if name not in subtasks],
        },
        parts={"perception": perception, "cognition": cognition},
    )


def _figures(images: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, float]:
    """A subtask's, from (right answer, answer) of each image's questions."""
    every = [right == given for pairs in images.values() for right, given in pairs]
    # An image of the same name could come again; its questions are two by two, as the official tool takes them.
    whole = [pairs[start : start + 2] for pairs in images.values() for start in range(0, len(pairs) - 1, 2)]
    both = [all(right == given for right, given in pair) for pair in whole]
    accuracy = 100 * (sum(every) / len(every))
    plus = 100 * (sum(both) / len(both)) if both else 0.0
    return {
        "score": accuracy + plus,
        "acc": accuracy,
        "acc_plus": plus,
        "questions": len(every),
        "images": len(both),
        "incomplete_images": sum(len(pairs) % 2 for pairs in images.values()),
        "other": sum(given == "other" for pairs in images.values() for _, given in pairs),
    }


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    summary="perception and cognition, summed points; 2374 yes/no questions",
    folder="MME",
    files=(
        File(_QUESTIONS, EVAL_ZIP, "run"),
        File(f"{_RELEASE}/", f"images and right answers, on request as {_OFFICIAL} says"),
    ),
    tables={"test": Table("lmms-lab/MME", "test")},
    max_new_tokens=128,
    from_folder=from_folder,
    from_tables=from_tables,
    truth_from_folder=truth_from_folder,
    truth_from_tables=truth_from_tables,
    score=score,
    missing="do not count, and a subtask without answers adds nothing to the sum",
    asked=lambda answers, truth: asked(answers, truth, lambda answer: _find(answer, truth)),
)

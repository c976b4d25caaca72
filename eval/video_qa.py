"""Questions about videos, as Video-LLaVA asks and scores them: TGIF-QA, MSVD-QA, MSRVTT-QA and ActivityNet-QA.

Prompt: one ``<image>`` for each of 8 frames, a line break, the question as it is; template ``llava_v1``; greedy, up to
1024 tokens. Score: GPT-3.5 says whether a prediction means the same as the answer; the accuracy is the share of "yes".
Source: Video-LLaVA, ``videollava/eval/video/{run_inference,eval}_video_qa.py``, without three of its faults: on several
GPUs it compares predictions with the answers to other questions, it mirrors videos at random, and it passes over videos
that are missing (here they are counted as wrong; ``details`` has the accuracy without them).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmark import Answer, Benchmark, File, Question, Score, Table, Visual
from eval.frames import EXTENSIONS, clip, videos_below
from eval.judge import Request, normalized_match
from eval.matching import match, unreadable
from eval.sources import Rows, Tables, need, read_json
from llava.video import FRAMES, read_frames

if TYPE_CHECKING:
    from PIL import Image

    from eval.judge import Judge

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


# Questions and answers


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


def read_items(folder: Path) -> list[Item]:
    """The questions in ``test_q.json`` and their answers in ``test_a.json``, in their order.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: one is damaged, they do not belong together, or two questions have one id.
    """
    questions, answers = (_records(folder / name) for name in ("test_q.json", "test_a.json"))
    where = f"{folder}: test_q.json and test_a.json"
    if len(questions) != len(answers):
        raise ValueError(f"{where} have {len(questions)} and {len(answers)} entries: fetch both again")
    items = []
    for place, (asked, answered) in enumerate(zip(questions, answers, strict=True)):
        ids = [need(row, "question_id", f"entry {place} of {where}") for row in (asked, answered)]
        if str(ids[0]) != str(ids[1]):  # the two are aligned by place too, and Video-LLaVA's script relies on that
            raise ValueError(f"{where} have other questions in entry {place}: {ids[0]!r} and {ids[1]!r}; fetch both")
        items.append(_item({**asked, **answered, "question_id": ids[0]}, "question_id", f"entry {place} of {where}"))
    return _unique(items, where)


def _records(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} is not a list of objects: fetch it again")
    return content


def _item(row: Mapping[str, Any], id_column: str, where: str) -> Item:
    name, video, question, answer = (need(row, key, where) for key in (id_column, "video_name", "question", "answer"))
    kind = row.get("type", row.get("question_type", "default"))
    return Item(name, str(video), str(question), str(answer), str(kind))


def _unique(items: Iterable[Item], where: str) -> list[Item]:
    """The items without exact repetitions: the official scorer counts one id once."""
    by_id: dict[str, Item] = {}
    for item in items:
        first = by_id.setdefault(str(item.id), item)
        if (item.video, item.question, item.answer) != (first.video, first.question, first.answer):
            raise ValueError(
                f"{where} have the question_id {item.id!r} twice: about {first.video}, {first.question!r} "
                f"({first.answer}), and about {item.video}, {item.question!r} ({item.answer}); scores go by id, so "
                "give each question its own"
            )
    return list(by_id.values())


def _by_id(items: Iterable[Item]) -> dict[str, Item]:
    return {str(item.id): item for item in items}


def _ask(item: Item, visual: Visual) -> Question:
    text = f"{'<image>' * FRAMES}\n{item.question}"
    return Question(item.id, text, (visual,), item.kind, prompt=item.question)


# Score


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


def accuracy(verdicts: Iterable[Verdict]) -> float | None:
    """Percent of "yes" among "yes" and "no"; None where there is neither."""
    said = [verdict.yes for verdict in verdicts if verdict.yes is not None]
    return 100 * sum(said) / len(said) if said else None


def average_score(verdicts: Sequence[Verdict]) -> float | None:
    """Mean of all scores, 0 to 5; None where there are none."""
    return sum(verdict.score for verdict in verdicts) / len(verdicts) if verdicts else None


def score(
    answers: Sequence[Answer], truth: Mapping[str, Item], judge: Judge | None, kinds: Mapping[str, str] | None = None
) -> Score:
    """Accuracy in percent, as ``eval_video_qa.py`` prints it (there as a fraction).

    As there: each id counts once, the last answer to it; answers whose verdict is neither yes nor no, or that the judge
    gave none about, are not in the accuracy; nor are questions without an answer. Other than there: an answer whose
    video could not be read is wrong, with score 0.

    Args:
        answers: in any order.
        truth: by id, as text.
        judge: see :mod:`eval.judge`.
        kinds: names of the types of questions.

    Raises:
        ValueError: there is nothing to score.
    """
    if judge is None:
        raise ValueError("open answers about videos need a judge: give --judge, a model's name or exact")
    matched = match(answers, truth)
    known = matched.answers
    broken = [name for name, answer in known.items() if unreadable(answer)]
    asked = [name for name in known if name not in set(broken)]
    if judge.exact:
        right = [normalized_match(known[name].text, truth[name].answer) for name in asked]
        judged: list[Verdict | None] = [Verdict(yes, 5 * yes) for yes in right]
    else:
        judged = judge.ask([judge_request(truth[name], known[name].text) for name in asked], parse_verdict)
    found = {name: verdict for name, verdict in zip(asked, judged, strict=True) if verdict is not None}
    verdicts = found | {name: Verdict(False, 0) for name in broken}
    headline = accuracy(verdicts.values())
    if headline is None:
        raise ValueError(
            f"there is nothing to score: of {len(truth)} questions {len(known)} have an answer, and "
            f"{len(found)} of those a verdict of the judge {judge.model}"
        )
    by_kind: dict[str, list[Verdict]] = {}
    for name, verdict in verdicts.items():
        by_kind.setdefault(truth[name].kind, []).append(verdict)
    kinds = kinds or {}
    types = {kinds.get(kind, kind): by_kind[kind] for kind in sorted(by_kind)}
    videos = list(dict.fromkeys(truth[name].video for name in broken))
    unjudged = [name for name in asked if name not in found]
    points = {name: float(verdict.yes) for name, verdict in verdicts.items() if verdict.yes is not None}
    details = {
        "judge": judge.model,
        **_counts(list(verdicts.values())),
        "average_score": None if judge.exact else average_score(list(verdicts.values())),
        "types": {name: {"accuracy": accuracy(some), "questions": len(some)} for name, some in types.items()},
        "unreadable_videos": len(videos),
        "unreadable_video_names": videos[:_NAMED],
        "accuracy_without_unreadable_videos": accuracy(found.values()),
        "unjudged": len(unjudged),
        "unjudged_ids": unjudged[:_NAMED],
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
        f"accuracy ({by})",
        headline,
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
    details = {**_counts(verdicts), "average_score": average_score(verdicts)}
    return Score("accuracy (graded)", headline, details, {}, None if None in said else [float(yes) for yes in said])


def _counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    said = [verdict.yes for verdict in verdicts]
    return {"scored": len(said), "yes": said.count(True), "no": said.count(False), "neither": said.count(None)}


# Tables


def _rows(tables: Tables, hub: str | None, title: str) -> Rows:
    if hub is None and tables.folder is None:
        raise ValueError(f"{title} is not on the hub: give a folder, Video-LLaVA's or one with parquet files")
    try:
        return tables["test"]
    except FileNotFoundError as error:
        if hub is not None:
            raise
        raise FileNotFoundError(
            f"{tables.folder} has no data/test-*.parquet with columns video_name, question, answer and question_id"
        ) from error


def _fetch_archives(dataset: str) -> Path:
    """The zip archives of a data set on the hub, fetched into its cache; returns their folder."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - where nothing is fetched it is not needed

    return Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=["*.zip"]))


def _items_in(rows: Rows, id_column: str) -> list[Item]:
    text = rows.without("video")
    items = (_item(row, id_column, f"row {index} of {rows.name}") for index, row in enumerate(text))
    return _unique(items, rows.name)


def _stored_videos(rows: Rows, folder: Path) -> dict[str, Visual] | None:
    """Videos in a table's column ``video``, by name; None where there is no such column."""
    if "video" not in rows:
        return None
    first: dict[str, int] = {}
    for index, name in enumerate(rows.column("video_name")):
        first.setdefault(str(name), index)
    keys = {name: f"{rows.name} video {name}" for name in first}
    return {
        name: Visual(keys[name], partial(_read_cell, rows, index, folder, keys[name]), FRAMES)
        for name, index in first.items()
    }


def _read_cell(rows: Rows, index: int, folder: Path, key: str) -> list[Image.Image]:
    cell = rows.cell(index, "video")
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(content, str):
        content, path = None, content
    if content is not None:
        return read_frames(content, key)
    if not path:
        raise ValueError(f"{key}: row {index} has neither its bytes nor its path")
    return read_frames(folder / path, str(folder / path))


def _find(videos: Mapping[str, Visual], item: Item, prefix: str, folder: Path) -> Visual:
    """A question's video among those of a folder; where it is not there, one that says so when it is opened."""
    found = videos.get(f"{prefix}{item.video}") or videos.get(item.video)
    return found or clip(folder / f"{prefix}{item.video}{EXTENSIONS[0]}")


# Benchmarks


def video_qa(
    *,
    name: str,
    title: str,
    size: str,
    folder: str,
    videos: str,
    source: str,
    hub: str | None = None,
    prefix: str = "",
    id_column: str = "question_id",
    kinds: Mapping[str, str] | None = None,
) -> Benchmark:
    """A benchmark, with all that the four share.

    A table has the columns video_name, question, answer, question_id and type (or question_type). The videos lie below
    the table's folder under their names, unpacked or in zip archives, or are in a column ``video``: a path from there,
    bytes, or ``{"bytes", "path"}``.

    Args:
        name: how commands call it.
        title: how tables call it.
        size: how many questions there are, in words.
        folder: in ``GPT_Zero_Shot_QA``.
        videos: folder of the videos in it.
        source: where the folder comes from.
        hub: data set on the hub; None: there is none, only folders of parquet files.
        prefix: of a video's name in its file's name.
        id_column: what a table calls the question's id.
        kinds: names of the types of questions.
    """
    table = Table(hub or f"{title} (there is none on the hub)", "test")

    def from_folder(root: Path) -> list[Question]:
        below = videos_below(root / videos)
        return [_ask(item, _find(below, item, prefix, root / videos)) for item in read_items(root)]

    def from_tables(tables: Tables) -> list[Question]:
        rows = _rows(tables, hub, title)
        items, root = _items_in(rows, id_column), tables.folder or _fetch_archives(table.dataset)
        below = _stored_videos(rows, root) or videos_below(root)
        return [_ask(item, _find(below, item, prefix, root)) for item in items]

    return Benchmark(
        name=name,
        title=title,
        summary=f"short open answers about videos, judged by GPT-3.5 (accuracy; {size})",
        folder=f"GPT_Zero_Shot_QA/{folder}",
        files=(File("test_q.json", source), File("test_a.json", source), File(f"{videos}/", source, "run")),
        tables={"test": table},
        from_folder=from_folder,
        from_tables=from_tables,
        truth_from_folder=lambda root: _by_id(read_items(root)),
        truth_from_tables=lambda tables: _by_id(_items_in(_rows(tables, hub, title), id_column)),
        score=partial(score, kinds=kinds),
        max_new_tokens=1024,
        conv_mode="llava_v1",
        judged=True,
        graded=graded,
    )

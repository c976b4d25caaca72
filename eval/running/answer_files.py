"""Files of answers: LLaVA's format, which runs write, and all forms that can be scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records import Answer


def answers_file(answers: Sequence[Answer], model: str, run: str) -> str:
    """The content of an answers file in LLaVA's format, one line for each answer.

    ``answer_id`` is a checksum where LLaVA draws one at random, so that the same answers give the same file.
    """
    lines = []
    for place, answer in enumerate(answers):
        name = hashlib.sha256(f"{model} {run} {place} {answer.text}".encode()).hexdigest()[:22]
        error = {key: value for key, value in answer.extra.items() if key == "error"}
        extra = {key: value for key, value in answer.extra.items() if key != "error"}
        record = {
            "question_id": answer.question_id,
            "prompt": answer.prompt,
            "text": answer.text,
            "answer_id": name,
            "model_id": model,
            **extra,
            "metadata": {"run": run, **error},
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


_NAMES = {
    "question_id": ("question_id", "id"),
    "text": ("text", "pred", "response"),
    "prompt": ("prompt", "question"),
}
_HALF = "half_written_lines"


def read_answers(path: Path) -> tuple[list[Answer], dict[str, Any]]:
    """The answers in a file: LLaVA's or Video-LLaVA's (a json object on each line, or a list of them), or MMMU's.

    MMMU's is one object, from id to text, or a folder with a list in each ``SUBJECT/output.json``.

    Returns:
        The answers in the file's order, and notes for the result's details: which models and runs they are of, and
        whether a last line was half written and left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is damaged or no answer, there are none, or they are of several models or runs.
    """
    if path.is_dir() and (subjects := sorted(path.glob("*/output.json"))):
        read = [read_answers(subject) for subject in subjects]
        half = sum(notes.get(_HALF, 0) for _, notes in read)
        return [answer for answers, _ in read for answer in answers], {_HALF: half} if half else {}
    if not path.is_file():
        raise FileNotFoundError(f"there is no answers file {path}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): save it as such") from error
    whole = _single_value(content, path)
    if isinstance(whole, dict) and not {"question_id", "id"} & whole.keys():
        return [Answer(name, _text(text, f"entry {name!r} of {path}").strip()) for name, text in whole.items()], {}
    notes: dict[str, Any] = {}
    if isinstance(whole, list):
        named = {f"entry {number} of {path}": record for number, record in enumerate(whole, start=1)}
    else:
        named = _lines(content, str(path), notes)
    answers, records = [_answer(record, where) for where, record in named.items()], named.values()
    if not answers:
        raise ValueError(f"{path} has no answers: give the file that a run wrote")
    made = {str(record["model_id"]): None for record in records if record.get("model_id")}
    runs = {str(own["run"]): None for own in map(_metadata, records) if own.get("run") is not None}
    for what, names in (("models", made), ("runs", runs)):
        if len(names) > 1:
            raise ValueError(
                f"{path} has answers of several {what} ({', '.join(names)}): score each in a file of its own"
            )
        if names:
            notes[what.removesuffix("s")] = next(iter(names))
    return answers, notes


def _lines(content: str, name: str, notes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The objects on a file's lines, by where they are. A last one that is half written is left out, and noted."""
    records = {}
    lines = content.split("\n")  # what is behind the last one's end is the empty text
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            records[where] = _parse(line, where)
        except ValueError:
            if number < len(lines):
                raise
            notes[_HALF] = 1
    return records


def _single_value(content: str, path: Path) -> Any:
    """The json value that the whole file is; None where it is lines."""
    try:
        return json.loads(content)
    except ValueError as error:
        if content.lstrip().startswith("["):  # its end is missing, or something in it is wrong
            raise ValueError(f"{path} begins as a json list, but is none ({error}): correct it there") from error
        return None


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    found = record.get("metadata")
    return found if isinstance(found, dict) else {}


def _answer(record: Any, where: str) -> Answer:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {type(record).__name__}, not an object with question_id, prompt and text")
    values = {}
    for field, names in _NAMES.items():
        found = next((name for name in names if record.get(name) is not None), None)
        if found is None and field != "prompt":
            raise ValueError(f"{where} has no {names[0]!r}: an answer has question_id, prompt and text")
        values[field] = record[found] if found else ""
    if not isinstance(values["question_id"], str | int) or isinstance(values["question_id"], bool):
        raise ValueError(f"{where} has the question_id {values['question_id']!r}: it must be a text or a whole number")
    known = {"question_id", "text", "prompt", "answer_id", "model_id", "metadata", "id", "pred", "response"}
    extra = {key: value for key, value in record.items() if key not in known}
    if error := _metadata(record).get("error"):
        extra["error"] = error
    return Answer(values["question_id"], _text(values["text"], where), _text(values["prompt"], where), extra)


def _text(value: Any, where: str) -> str:
    """A text; numbers, which some tools write for short answers, are taken as such."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where} has {json.dumps(value, ensure_ascii=False)} where a text should be: write one")
    return str(value)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where} is damaged ({error}): correct it, or delete this line to score the others"
        ) from error
    return record

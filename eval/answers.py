"""Answers on disk: a file per run, to which a killed run goes on writing.

The first line says what the answers were made with; every other one is an answer. Lines are whole or they are not
there: a last line without its end (the process was killed while it wrote) is cut off and answered again.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        id: of the question.
        text: as the model gave it, without special tokens and blanks around.
        visual_tokens: visual tokens that reached the language model, counted there.
    """

    id: str
    text: str
    visual_tokens: int


class AnswersFile:
    """An open file of answers; see :func:`open_answers`.

    Attributes:
        answers: by question id, those of earlier processes included.
        made: the facts that were noted when the file was begun.
    """

    def __init__(self, file: IO[bytes], setting: dict[str, Any], made: dict[str, Any]) -> None:
        self._file = file
        self.answers: dict[str, Answer] = {}
        name = file.name
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        lines = content[:whole].splitlines()
        setting = json.loads(json.dumps(setting))  # as a file gives it back: lists for tuples
        header = _parse(lines[0], name, 1) if lines else {"setting": setting, "made": made}
        if not lines:
            self._write([header])
        self.made: dict[str, Any] = header.get("made", {})
        _check_setting(header.get("setting", {}), setting, name)
        for number, line in enumerate(lines[1:], start=2):
            answer = Answer(**_parse(line, name, number))
            if answer.id in self.answers:
                raise ValueError(f"{name} answers question {answer.id} twice: delete it, to answer it all again")
            self.answers[answer.id] = answer

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers; once this returns, killing the process does not lose them."""
        self._write([asdict(answer) for answer in answers])
        self.answers |= {answer.id: answer for answer in answers}

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode())
        self._file.flush()


@contextmanager
def open_answers(path: Path, setting: dict[str, Any], made: dict[str, Any]) -> Iterator[AnswersFile]:
    """Open a run's answers, to go on with them or begin.

    Args:
        path: the file.
        setting: everything that decides the answers.
        made: further facts to note (versions, date); they may differ from those in the file.

    Raises:
        ValueError: the file's answers were made with another setting, or a line of it is damaged.
        BlockingIOError: another process writes to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it when the process ends, however
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is writing to {path}: wait for it, or choose another --output"
            ) from error
        yield AnswersFile(file, setting, made)


def _parse(line: bytes, name: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"line {number} of {name} is damaged ({error}): delete the file, to answer it all again"
        ) from error
    return record


def _check_setting(there: dict[str, Any], now: dict[str, Any], name: str) -> None:
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {there.get(key)!r}, is {now.get(key)!r}" for key in differing)
        raise ValueError(
            f"{name} has answers of another setting, which are not to be mixed ({changes}): choose another --output, "
            "or delete the file to answer it all again"
        )

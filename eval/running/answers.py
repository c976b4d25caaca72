"""Answers on disk: the parts that processes write while they answer, and the answers file that these are merged into.

A part's first line says what the answers were made with; every other one is an answer, with a checksum of the images
that it is about. A line that does not count leaves the others alone, and its question is asked again: a last one
without its end (the process was killed while it wrote; it is cut off), a damaged one, one about images that have
changed since.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from llava.storage.files import append, writing
from llava.storage.lock import lock

from ..records import Answer, Question

GO_ON = "The answers that there are stay: the same command goes on from there"  # whatever cannot be written of a run


@dataclass(frozen=True)
class Given:
    """What a model gave for a question.

    Attributes:
        place: of the question in its benchmark, from 0.
        text: as the model gave it, without special tokens and blanks around.
        visual_tokens: visual tokens that reached the language model, counted there.
        seconds: of vision tower and projector, prefill and decoding; of a batch, divided by its questions.
        error: why nothing was asked (an image or video that cannot be read).
    """

    place: int
    text: str
    visual_tokens: int
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    error: str | None = None


class Part:
    """An open file of answers; see :func:`open_part`.

    Attributes:
        given: by place, those of all parts of the run, earlier processes included.
        made: the facts that were noted when the first part was begun.
        damaged: lines that do not count, in words.
        changed: places without an answer that have one about other images or videos.
    """

    def __init__(
        self,
        file: FileIO,
        setting: dict[str, Any],
        made: dict[str, Any],
        errors: bool,
        contents: Sequence[str] | None,
    ) -> None:
        self._file = file
        self._errors = errors
        self._contents = contents
        self._setting = json.loads(json.dumps(setting))  # as a file gives it back: lists for tuples
        if not _cut(file):
            self._write([{"setting": self._setting, "made": made}])
        self.given: dict[int, Given] = {}
        self.made: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Read all parts of the run: what other processes have written meanwhile."""
        own = Path(self._file.name)
        self.given, self.damaged, self.changed = {}, [], set()
        places: dict[int, str] = {}  # where each is from
        for path in sorted(own.parent.glob(f"{own.name.rsplit('.', 2)[0]}.*.jsonl"), key=lambda path: path != own):
            self._read(path, places)
        self.changed -= self.given.keys()

    def _read(self, path: Path, places: dict[int, str]) -> None:
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
        if not lines:
            return  # another process has just begun it
        header = _header(lines[0], path)
        _check_setting(header["setting"], self._setting, str(path))
        self.made = self.made or header.get("made", {})
        for number, line in enumerate(lines[1:], start=2):
            where = f"line {number} of {path}"
            try:
                given, about = _given(line)
            except (ValueError, TypeError) as error:
                self.damaged.append(f"{where} ({error})")
                continue
            if self._contents is not None:
                if given.place >= len(self._contents):
                    continue  # it was asked with a larger limit
                if about != self._contents[given.place]:
                    self.changed.add(given.place)
                    continue
            if given.error and not self._errors:
                continue
            earlier = self.given.get(given.place)
            if earlier and not earlier.error and not given.error and earlier.text != given.text:
                raise ValueError(
                    f"{places[given.place]} and {where} answer question {given.place} differently: delete the wrong "
                    "one of these lines, or both, and it is asked again; the other answers stay"
                )
            if earlier is None or earlier.error:
                self.given[given.place], places[given.place] = given, where

    def append(self, given: Sequence[Given]) -> None:
        """Write answers; once this returns, killing the process does not lose them."""
        contents = self._contents
        self._write([{**asdict(one), **({} if contents is None else {"about": contents[one.place]})} for one in given])
        self.given |= {one.place: one for one in given}

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        append(self._file, lines.encode(), GO_ON)


def _header(line: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if not isinstance(header["setting"], dict):
            raise TypeError("no setting")
    except (ValueError, TypeError, KeyError) as error:
        run = path.name.rsplit(".", 2)[0]
        raise ValueError(
            f"line 1 of {path} should say what the answers below it were made with, and is damaged ({error}): put line "
            f"1 of another {run}.*.jsonl in its place, if there is one; else its answers cannot be told from those of "
            "another model, so move the file away, and they are given again"
        ) from error
    return header


def _given(line: bytes) -> tuple[Given, str | None]:
    """The answer on a line, and the checksum of what it is about; ValueError or TypeError where it is none."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise TypeError("not an object")
    about = record.pop("about", None)
    given = Given(**{**record, "seconds": tuple(record.get("seconds", (0, 0, 0)))})
    if isinstance(given.place, bool) or not isinstance(given.place, int) or given.place < 0:
        raise TypeError(f"the place {given.place!r}")
    if not isinstance(given.text, str) or not isinstance(given.error, str | None):
        raise TypeError(f"the text {given.text!r}, the error {given.error!r}")
    if len(given.seconds) != 3 or not all(isinstance(n, int | float) for n in (*given.seconds, given.visual_tokens)):
        raise TypeError(f"{given.visual_tokens!r} visual tokens, {given.seconds!r} seconds")
    return given, about


def _cut(file: FileIO) -> int:
    """Cut off a line without its end; the bytes that are left."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return whole


def part_path(folder: Path, run: str, rank: int) -> Path:
    """Where a process writes its answers of a run."""
    return folder / "answers" / "parts" / f"{run}.{rank}.jsonl"


@contextmanager
def open_part(
    path: Path,
    setting: dict[str, Any],
    made: dict[str, Any],
    errors: bool = True,
    contents: Sequence[str] | None = None,
) -> Iterator[Part]:
    """Open a process's part of a run's answers, to go on with them or begin; all parts of the run are read.

    Args:
        path: the file, see :func:`part_path`.
        setting: everything that decides the answers.
        made: further facts to note (versions, date); they may differ from those in the file.
        errors: questions that could not be asked count as done; else they are asked again.
        contents: by place, a checksum of the images or videos of each question that is asked, see
            :func:`eval.reading.fingerprint.contents_of`: answers about others do not count. None: nothing is compared.

    Raises:
        ValueError: a part's answers were made with another setting, its first line is damaged, or two lines contradict
            each other.
        BlockingIOError: another process writes to it.
    """
    with writing(path, GO_ON):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("ab+", buffering=0)
    with opened as file:
        lock(file, path, "--output")
        yield Part(file, setting, made, errors, contents)


def as_answers(questions: Sequence[Question], given: Mapping[int, Given]) -> list[Answer]:
    """What was given to some questions, in their order, as a benchmark scores it."""
    found = []
    for place, question in enumerate(questions):
        one = given[place]
        extra = {**question.extra, **({"error": one.error} if one.error else {})}
        found.append(
            Answer(question.id, one.text, question.text if question.prompt is None else question.prompt, extra)
        )
    return found


def _check_setting(there: dict[str, Any], now: dict[str, Any], name: str) -> None:
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {there.get(key)!r}, is {now.get(key)!r}" for key in differing)
        raise ValueError(
            f"{name} has answers of another setting, which are not to be mixed ({changes}): choose another --output, "
            "or delete the file to answer it all again"
        )

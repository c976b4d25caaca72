"""Videos as benchmarks have them: files by name, also in zip archives."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.video import FRAMES, read_frames

from .. import COMMAND
from ..records import Question, Visual

if TYPE_CHECKING:
    from PIL import Image

    from ..models.base import Prompt
    from ..running.methods import Run

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")  # Video-LLaVA looks for the first four, in this order


def clip(path: Path) -> Visual:
    """A video file; it is read when its turn comes."""
    return Visual(str(path), partial(read_frames, path, str(path)), FRAMES, path)


def with_frames(questions: Sequence[Question], count: int | None) -> Sequence[Question]:
    """The same questions, with so many frames of each video; shorter ones have some more than once. None: as they are.

    Raises:
        ValueError: none is about a video.
    """
    if count is None:
        return questions

    def longer(visual: Visual) -> Visual:
        if visual.frames is None:
            return visual
        return replace(visual, open=partial(visual.open, count=count), frames=count)

    found = [replace(question, visuals=tuple(map(longer, question.visuals))) for question in questions]
    if frames_of(found) is None:
        raise ValueError(f"--frames {count}: this benchmark has no videos; leave it out")
    return found


def frames_of(questions: Iterable[Question]) -> int | None:
    """How many frames of a video the questions show; None where there are no videos."""
    return next((visual.frames for question in questions for visual in question.visuals if visual.frames), None)


def check_context(model: Any, prompts: Iterable[Prompt], runs: Iterable[Run]) -> None:
    """Check that prompts about videos fit into the model's context with each method.

    Else their end would be cut off, and that is the question. Not counted are tiles of frames and OneVision's newline.

    Raises:
        ValueError: one does not; the message has the numbers.
    """
    asked = [(prompt, frames) for prompt in prompts if (frames := frames_of([prompt.question]))]
    if not asked:
        return
    prompt, frames = max(asked, key=lambda pair: pair[0].text_tokens)
    limits = (getattr(model.config, "tokenizer_model_max_length", None), model.config.max_position_embeddings)
    limit = min(filter(None, limits))
    for run in runs:
        tokens = model.frame_length if run.tokens is None or run.inside else run.tokens
        length = prompt.text_tokens + frames * tokens
        if length > limit:
            raise ValueError(
                f"{run.name}: {frames} frames of {tokens} visual tokens and the text are {length} tokens, but the "
                f"model's context is {limit}: give fewer --frames, or a method with fewer --tokens"
            )


def videos_below(folder: Path) -> dict[str, Visual]:
    """All videos in a folder, in its subfolders and in zip archives there, by file name, with and without extension.

    Of several with one name the first of :data:`EXTENSIONS` counts. Videos in archives need not be unpacked.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: an archive is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: `{COMMAND} prepare` says where it comes from")
    found: list[tuple[int, str, str, Visual]] = []

    def add(place: str, visual: Visual) -> None:
        name = Path(place).name
        if (suffix := Path(place).suffix.lower()) in EXTENSIONS and not name.startswith("._"):  # macOS writes those
            found.append((EXTENSIONS.index(suffix), place, name, visual))

    for path in folder.rglob("*"):
        add(str(path), clip(path))
        if path.suffix.lower() == ".zip":
            for member, content in _members(path).items():
                key = f"{path}/{member}"
                add(key, Visual(key, partial(_read_member, path, member), FRAMES, content=lambda own=content: own))
    found.sort(key=lambda each: each[:2])
    named: dict[str, Visual] = {}
    for _, _, name, visual in found:
        named.setdefault(Path(name).stem, visual)
        named.setdefault(name, visual)
    return named


def _members(archive: Path) -> dict[str, str]:
    """What is in an archive, with the length and the checksum of each that the archive itself has."""
    try:
        with zipfile.ZipFile(archive) as file:
            return {member.filename: f"{member.file_size} {member.CRC:08x}" for member in file.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged ({error}): fetch it again") from error


def _read_member(archive: Path, member: str, count: int = FRAMES) -> list[Image.Image]:
    try:
        with zipfile.ZipFile(archive) as file:
            content = file.read(member)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{member} in {archive} is damaged ({error}): fetch it again") from error
    return read_frames(content, f"{archive}/{member}", count)

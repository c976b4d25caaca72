"""The parts of a run on disk: what is damaged in them, and which answers stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.running.answers import Given, open_part


def test_parts_of_a_run(tmp_path: Path):
    path = tmp_path / "run.0.jsonl"
    with open_part(path, {"tokens": 4}, {}) as part:
        part.append([Given(1, "yes", 4), Given(2, "Übergröße", 4)])
        with pytest.raises(BlockingIOError, match="another process is writing"), open_part(path, {"tokens": 4}, {}):
            pass
        with open_part(tmp_path / "run.1.jsonl", {"tokens": 4}, {}) as other:  # of another process
            assert other.given == part.given
    with open_part(path, {"tokens": 4}, {}) as part:
        assert part.given[2].text == "Übergröße" and part.damaged == []


GOOD = b'{"place": 5, "text": "no", "visual_tokens": 4, "seconds": [1, 2, 3], "error": null}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"{\n",
        b"\0\0\0\0\n",
        b"\xff\n",
        b"[1]\n",
        b"{}\n",
        GOOD.replace(b'"place": 5', b'"place": true'),
        GOOD.replace(b'"place": 5', b'"place": -1'),
        GOOD.replace(b'"no"', b'["no"]'),
        GOOD.replace(b"[1, 2, 3]", b"[1, 2]"),
        GOOD.replace(b"[1, 2, 3]", b"3"),
        GOOD.replace(b"4", b"null"),
        GOOD.replace(b"place", b"question_id"),
        GOOD.rstrip() + GOOD,
    ],
)
def test_a_damaged_line_costs_its_own_answer(line: bytes, tmp_path: Path):
    """The others stay, nothing is written over, and what is answered anew counts from then on."""
    path = tmp_path / "run.0.jsonl"
    with open_part(path, {"tokens": 4}, {}) as part:
        part.append([Given(1, "yes", 4), Given(2, "no", 4)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(damaged := b"".join([*lines[:2], line, lines[2]]))
    with open_part(path, {"tokens": 4}, {}) as part:
        assert part.given == {1: Given(1, "yes", 4), 2: Given(2, "no", 4)}
        assert len(part.damaged) == 1 and part.damaged[0].startswith(f"line 3 of {path} (")
        assert path.read_bytes() == damaged
        part.append([Given(5, "new", 4)])
    with open_part(path, {"tokens": 4}, {}) as part:
        assert part.given[5].text == "new"


def test_lines_that_cannot_be_asked_again(tmp_path: Path):
    """A damaged first line, and two that contradict each other: the cure keeps what can be kept."""
    path = tmp_path / "run.0.jsonl"
    with open_part(path, {"tokens": 4}, {}) as part:
        part.append([Given(1, "yes", 4), Given(2, "no", 4)])
    lines = path.read_bytes().splitlines(keepends=True)
    other = lines[1].replace(b"yes", b"no")
    path.write_bytes(b"".join([*lines, lines[1]]))  # the same twice is no harm
    with open_part(path, {"tokens": 4}, {}) as part:
        assert len(part.given) == 2
    for content, message in (
        ([*lines, other], r"line 2 of .* and line 4 of .* answer question 1 differently: delete the wrong one"),
        ([b"{\n", *lines[1:]], r"line 1 of .*, and is damaged .*: put line 1 of another run\.\*\.jsonl in its place"),
        (lines[1:], "line 1 of .* is damaged"),
    ):
        path.write_bytes(b"".join(content))
        with pytest.raises(ValueError, match=message), open_part(path, {"tokens": 4}, {}):
            pass
        assert path.read_bytes() == b"".join(content)

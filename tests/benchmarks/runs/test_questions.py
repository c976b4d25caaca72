"""LLaVA's question files, and how options are asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.reading.questions import LETTER, SHORT_ANSWER, lettered, listed, read_questions


def test_instructions():
    """Verbatim: benchmarks.md, 3.3 and 4.1."""
    assert LETTER == "Answer with the option's letter from the given choices directly."
    assert SHORT_ANSWER == "\nAnswer the question using a single word or phrase."


def test_options():
    assert listed("How many?", ["One", "Two"]) == "How many?\nA. One\nB. Two"
    assert listed("Why?", []) == "Why?"
    assert list(lettered(["x"] * 5)) == ["A", "B", "C", "D", "E"]


def test_a_question_file(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    line = '{"question_id": 7, "image": "a/1.jpg", "text": "Is it?", "category": "other"}\n'
    path.write_text(line)
    (question,) = read_questions(path, tmp_path / "images")
    assert (question.id, question.text, question.category, question.prompt) == (7, "Is it?", "other", None)
    assert question.visuals[0].path == tmp_path / "images" / "a" / "1.jpg"
    path.write_text(line + line)
    assert len(read_questions(path, tmp_path, repeated=True)) == 2
    with pytest.raises(ValueError, match=r"1 ids more than once \(7\)"):
        read_questions(path, tmp_path)
    path.write_text(line + '\n{"question_id": 8, "image": "a"}')
    with pytest.raises(ValueError, match="has no 'text'; it has question_id, image"):
        read_questions(path, tmp_path)

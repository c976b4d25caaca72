"""MM-Vet: what is asked and what the judge sees, its grades, the score, and the submission."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data_mmvet
import pytest
from judge_server import JudgeServer

from eval.benchmarks.mmvet import BENCHMARK
from eval.reading.tables import Tables
from eval.records import Answer
from eval.scoring.judge import Judge, api_judge, exact_judge
from eval.scoring.mmvet_judge import PROMPT, Item, asked_again, grade_of, matches, request_of

TEXTS = ["x = -1 or x = -5", "It is lime.", "the core", "This is a red field."]


@pytest.fixture
def judged(
    tmp_path: Path, serve: Callable[..., JudgeServer], hurried: None
) -> Callable[..., tuple[JudgeServer, Judge]]:
    """A judge for a function from what comes after the examples, and the temperature, to a reply."""

    def start(reply: Callable[[str, float], str]) -> tuple[JudgeServer, Judge]:
        def answer(body: dict[str, Any], number: int) -> str:
            (message,) = body["messages"]
            assert message["role"] == "user" and body["max_tokens"] == 3 and body["model"] == "gpt-4-0613"
            return reply(message["content"].removeprefix(PROMPT + "\n"), body["temperature"])

        return serve(answer), api_judge("gpt-4-0613", tmp_path / "cache", workers=1)

    return start


def answers_of(texts: list[str]) -> list[Answer]:
    return [Answer(number, text) for number, text in enumerate(texts)]


# Data


def test_both_ways_give_the_same(folder: Path, tables: Tables):
    ours, theirs = BENCHMARK.from_folder(folder), BENCHMARK.from_tables(tables)
    assert [(one.id, one.text) for one in ours] == [(one.id, one.text) for one in theirs]
    assert [(one.id, one.text) for one in ours][:2] == [(0, "What is x in the equation?"), (1, "What color is it?")]
    assert ours[2].visuals[0].path == folder / "images" / "v1_2.jpg"
    for one, other in zip(ours, theirs, strict=True):
        assert one.visuals[0].open()[0].tobytes() == other.visuals[0].open()[0].tobytes()
    assert BENCHMARK.truth_from_folder(folder) == BENCHMARK.truth_from_tables(tables)
    assert BENCHMARK.truth_from_folder(folder)["v1_3"] == Item(
        "Can you describe it?", "A red field", ("rec", "gen", "know")
    )


def test_scoring_needs_only_the_items(folder: Path):
    (folder / "llava-mm-vet.jsonl").unlink()
    for image in (folder / "images").iterdir():
        image.unlink()
    assert len(BENCHMARK.truth_from_folder(folder)) == 4


def test_bad_data(folder: Path):
    lines = (folder / "llava-mm-vet.jsonl").read_text()
    (folder / "llava-mm-vet.jsonl").write_text(lines + lines.split("\n")[0])
    with pytest.raises(ValueError, match="more than once"):
        BENCHMARK.from_folder(folder)
    (folder / "llava-mm-vet.jsonl").write_text('{"question_id": 0, "image": "v1_0.png"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* has no 'text'"):
        BENCHMARK.from_folder(folder)
    (folder / "mm-vet.json").write_text("[]")
    with pytest.raises(ValueError, match="is list, not an object"):
        BENCHMARK.truth_from_folder(folder)
    (folder / "mm-vet.json").write_text('{"v1_0": {"question": "?", "answer": "!"}}')
    with pytest.raises(ValueError, match=r"v1_0 in .* has no 'capability'"):
        BENCHMARK.truth_from_folder(folder)


# The judge


def test_prompt():
    """The official tool's, as benchmarks.md gives it; here by its checksum, its head and its end."""
    assert PROMPT.startswith("Compare the ground truth and prediction from AI models, to give a correctness score")
    lines = PROMPT.split("\n")
    assert lines[1:5] == [
        "",
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0",
    ]
    assert [line.rsplit(" | ", 1)[-1] for line in lines[4:11]] == ["0.0", "0.5", "0.5", "0.5", "1.0", "0.4", "1.0"]
    assert lines[11:] == [""]
    assert hashlib.sha256(PROMPT.encode()).hexdigest().startswith("d1b3e0a5b4e72c88")


def test_what_the_judge_is_asked():
    request = request_of(Item("What is d?", "1.25<OR>5/4<AND>x", ()), "d = 5/4")
    assert (request.temperature, request.max_tokens) == (0.0, 3)
    (message,) = request.messages
    assert message == {
        "role": "user",
        "content": PROMPT + "\nWhat is d? | 1.25 <OR> 5/4 <AND> x | d = 5/4 | ",
    }
    again = [asked_again(request, attempt) for attempt in (1, 2, 3, 4)]
    assert [one.temperature for one in again] == [0.0, 0.5, 1.0, 1.5]  # the official tool warms up late
    assert {one.messages[0]["content"] for one in again} == {
        message["content"] + "\nPredict the correctness of the answer (digit): "
    }


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        *[("0.5", 0.5), ("1", 1.0), ("0.0", 0.0), ("0.7 |", 0.7), ("1.0\n", 1.0), ("1.0\nThe", None)],
        *[(" 0.5", None), ("1.1", None), ("-0.1", None), ("", None), ("The", None), ("0.5.", None), ("nan", None)],
    ],
)
def test_grades(reply: str, grade: float | None):
    assert grade_of(reply) == grade


def test_score(folder: Path, judged):
    """By hand: 0.5 and 0.8 for items with ocr and math, 1.0 and 0.3 for others."""
    grades = {"What is x": "0.5", "What color": "1.0", "What earth": "0.8", "Can you": "0.3"}
    server, judge = judged(lambda row, temperature: next(grades[key] for key in grades if row.startswith(key)))
    truth = BENCHMARK.truth_from_folder(folder)
    result = BENCHMARK.score(answers_of(TEXTS), truth, judge)
    assert result.score == pytest.approx(65.0) and "gpt-4-0613" in result.metric
    assert result.parts == pytest.approx({"rec": 65.0, "ocr": 65.0, "know": 30.0, "gen": 30.0, "math": 65.0})
    assert list(result.parts) == ["rec", "ocr", "know", "gen", "math"]
    assert result.details["capability_sets"] == pytest.approx({"ocr_math": 65.0, "rec": 100.0, "rec_know_gen": 30.0})
    assert result.details["items_by_capability"] == {"rec": 2, "ocr": 2, "know": 1, "gen": 1, "math": 2}
    assert result.details["items_by_capability_set"] == {"ocr_math": 2, "rec": 1, "rec_know_gen": 1}
    assert result.points == [0.5, 1.0, 0.8, 0.3]
    assert (result.details["missing"], result.details["unjudged"], result.details["unexpected"]) == (0, 0, 0)
    assert sorted(body["messages"][0]["content"].rsplit("\n", 1)[-1] for body in server.asked)[-1] == (
        "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | "
    )
    BENCHMARK.score(answers_of(TEXTS), truth, judge)
    assert len(server.asked) == 4  # the rest is in the cache


def test_a_judge_without_grades(folder: Path, judged):
    """Five replies at the official temperatures, then 0; the fourth answer gets its grade when asked again."""

    def reply(row: str, temperature: float) -> str:
        if row.startswith("Can you") and row.endswith("(digit): "):
            return "0.9"
        return "Correct" if row.startswith(("What is x", "Can you")) else "1.0"

    server, judge = judged(reply)
    result = BENCHMARK.score(answers_of(TEXTS), BENCHMARK.truth_from_folder(folder), judge)
    assert result.score == pytest.approx(100 * (0 + 1 + 1 + 0.9) / 4)
    assert "INCOMPLETE: no readable reply of the judge about 1 of 4 answers, which have 0" in result.metric
    assert result.details["unjudged"] == 1 and result.points == [0.0, 1.0, 1.0, 0.9]
    about_x = [body for body in server.asked if "What is x" in body["messages"][0]["content"].removeprefix(PROMPT)]
    assert [body["temperature"] for body in about_x] == [0.0, 0.0, 0.5, 1.0, 1.5]


def test_no_reply_has_a_grade(folder: Path, judged):
    """Neither from our judge, which names the file, nor from any other."""
    truth = BENCHMARK.truth_from_folder(folder)
    server, judge = judged(lambda row, temperature: "Correctness: 1.0")
    with pytest.raises(ValueError, match=r"none of the replies of the judge gpt-4-0613 .*cache/unreadable/.*\.json"):
        BENCHMARK.score(answers_of(TEXTS), truth, judge)
    assert len(server.asked) == 4 * 5
    busy = SimpleNamespace(model="m", exact=False, ask=lambda requests, parse, retry: [parse("busy") for _ in requests])
    lost = Answer(3, "", "", {"error": "there is no image"})
    for answers in (answers_of(TEXTS), [*answers_of(TEXTS)[:3], lost]):
        with pytest.raises(ValueError, match=r"none of the replies of the judge m has a grade.*by another judge"):
            BENCHMARK.score(answers, truth, busy)


def test_answers_that_are_missing_repeated_or_to_nothing(folder: Path):
    """An item without answer counts as 0; of two answers the last counts, as in LLaVA's script; ids may be texts."""
    answers = [Answer(1, "red"), Answer("v1_1", "green"), Answer("2", "mantle"), Answer(77, "green")]
    result = BENCHMARK.score(answers, BENCHMARK.truth_from_folder(folder), exact_judge())
    assert result.score == 50.0 and result.points is None
    details = result.details
    assert (details["missing"], details["unexpected"], details["repeated"]) == (2, 1, 1)
    with pytest.raises(ValueError, match="there are no answers"):
        BENCHMARK.score([], BENCHMARK.truth_from_folder(folder), exact_judge())


def test_images_that_could_not_be_read(folder: Path, judged):
    """0 without asking the judge; 50 = 100 * (1 + 0 + 1 + 0) / 4."""
    server, judge = judged(lambda row, temperature: "1.0")
    lost = {"error": "there is no image"}
    answers = [Answer(0, "-1"), Answer(1, "", "", lost), Answer(2, "mantle"), Answer(3, "", "", lost)]
    result = BENCHMARK.score(answers, BENCHMARK.truth_from_folder(folder), judge)
    assert (result.score, result.points) == (50.0, [1.0, 0.0, 1.0, 0.0])
    assert (result.details["unreadable"], result.details["unjudged"], len(server.asked)) == (2, 0, 2)


def test_the_proxy(folder: Path):
    result = BENCHMARK.score(answers_of(TEXTS), BENCHMARK.truth_from_folder(folder), exact_judge())
    assert result.score == 75.0 == data_mmvet.expected(TEXTS)
    assert "proxy" in result.metric and result.details["judge"] == "exact"
    with pytest.raises(ValueError, match="needs a judge"):
        BENCHMARK.score([], {}, None)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("x = -1", "-1<AND>-5", False),
        ("-5 and -1", "-1<AND>-5", True),
        ("d is 1.25", "1.25<OR>5/4", True),
        ("d is 5/4", "1.25<OR>5/4", True),
        ("d is 4/5", "1.25<OR>5/4", False),
        ("b", "a b<AND>c<OR>b", True),
        ("c", "a b<AND>c<OR>b", False),
    ],
)
def test_matches(text: str, answer: str, right: bool):
    assert matches(text, answer) is right


# The submission


def test_submission(folder: Path, tmp_path: Path):
    path = BENCHMARK.submit(answers_of(TEXTS), BENCHMARK.truth_from_folder(folder), tmp_path / "upload")
    assert json.loads(path.read_text()) == {f"v1_{number}": text for number, text in enumerate(TEXTS)}

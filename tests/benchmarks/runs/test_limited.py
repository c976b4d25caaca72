"""A run with ``--limit`` is scored over what was asked, in every benchmark; and what a score lacks is said."""

from __future__ import annotations

import json
from pathlib import Path

import data_gqa
import pytest
from test_end_to_end import NAMES, SERVER, WORDS, data_module

from eval.__main__ import main as eval_command
from eval.benchmarks import gqa, mmbench, sqa
from eval.reading.tables import Tables
from eval.records import Answer, Question, Score, UnscoredError
from eval.registry import BENCHMARKS
from eval.running.answers import Given, as_answers
from eval.running.data import Data
from eval.running.methods import Run
from eval.running.scoring import score_all
from eval.scoring.judge import exact_judge
from eval.scoring.matching import asked, shortfalls

# In these, questions that were not asked had their share of the headline; in the others they have none.
WRONG = ("gqa", "mmvet", "seed", "vizwiz", "vqav2")


def data_of(name: str, root: Path) -> Data:
    """A benchmark's tiny data in LLaVA's folder; where a server scores that, the hub's."""
    module, more = data_module(name)
    benchmark = BENCHMARKS[name]
    if name in SERVER:
        module.write_tables(root, *more)
        return Data(benchmark, root, Tables(benchmark.tables, root))
    module.write_folder(root, *more)
    return Data(benchmark, root / benchmark.folder)


def answers_to(questions: list[Question], text: str) -> list[Answer]:
    return as_answers(questions, {place: Given(place, text, 6) for place in range(len(questions))})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llavabench"])
def test_over_what_was_asked(name: str, tmp_path: Path):
    """The first two questions are all there are: the others have no share."""
    data = data_of(name, tmp_path)
    benchmark, truth, few = data.benchmark, data.truth(), data.questions()[:2]
    judge = exact_judge() if benchmark.judged else None

    def official(own: list[Answer]) -> Score:
        return benchmark.score(own, truth, judge)

    own = max((answers_to(few, word) for word in WORDS[name]), key=lambda own: official(own).score)
    (limited,) = score_all(benchmark, {Run("vanilla"): own}, truth, judge, limited=True).values()
    whole = official(own)
    assert (limited.details["missing"], limited.details["unexpected"]) == (0, 0)
    assert shortfalls(limited.details, benchmark.missing) == []
    assert shortfalls(whole.details, benchmark.missing) != []
    if name in WRONG:
        assert limited.score > whole.score > 0
        assert limited.score == pytest.approx(whole.score * whole.details["questions"] / 2)
        assert len(limited.points) == 2 and whole.points is None  # so that there is a standard error
    elif not name.startswith("mmbench"):
        assert limited.score == pytest.approx(whole.score)


def test_gqa_of_a_hundred():
    truth = {str(number): gqa.Gold("yes") for number in range(100)}
    answers = [Answer("0", "yes"), Answer("1", "yes")]
    assert gqa.score(answers, truth).score == 2  # the official tool's, of a whole file
    assert gqa.score(answers, asked(answers, truth)).score == 100


def test_reviews_of_what_was_asked(tmp_path: Path):
    data = data_of("llavabench", tmp_path)
    few = data.questions()[:2]
    assert list(asked(answers_to(few, "red"), data.truth())) == [str(question.id) for question in few]


def test_rotations_that_were_not_asked():
    """They do not make a question wrong, and the metric says that they are not in it."""
    rows = [
        {"index": index, "answer": answer, **dict.fromkeys("ABCD", "x")}
        for index, answer in ((1, "A"), (2, "B"), (1_000_001, "B"), (3, "C"))
    ]
    truth, answers = mmbench.Truth("dev", rows), [Answer(1, "A"), Answer(2, "C")]
    benchmark = BENCHMARKS["mmbench"]
    (limited,) = score_all(benchmark, {Run("vanilla"): answers}, truth, None, limited=True).values()
    assert (limited.score, limited.points) == (50, [1, 0])
    assert limited.metric == "circular accuracy (of 1 of 2 questions not all rotations were asked)"
    assert (official := benchmark.score(answers, truth, None)).score == 0 and official.metric == "circular accuracy"


def test_a_limit_below_the_first_image_is_no_error(capsys):
    """ScienceQA's headline is over questions with an image: where none was asked, there is none."""
    truth = {"1": sqa.Problem(0, 2), "2": sqa.Problem(1, 2)}
    answers = [Answer("1", "A", "which?")]
    with pytest.raises(UnscoredError, match="none of the 1 answers has <image>"):
        sqa.score(answers, truth)
    assert score_all(BENCHMARKS["sqa"], {Run("vanilla"): answers}, truth, None, limited=True) == {}
    assert "vanilla: answers are written, not scored: none of the 1 answers" in capsys.readouterr().err


def gqa_score(tmp_path: Path, answers: str, name: str = "gqa") -> tuple[int, dict]:
    """``eval score`` of a file with these lines."""
    data_gqa.write_folder(tmp_path)
    (tmp_path / "answers.jsonl").write_text(answers)
    out = tmp_path / "score.json"
    places = ["--answers", str(tmp_path / "answers.jsonl"), "--data-root", str(tmp_path), "--output", str(out)]
    status = eval_command(["score", name, *places])
    return status, json.loads(out.read_text()) if status == 0 else {}


def line(name: object, text: object, **more: object) -> str:
    return json.dumps({"question_id": name, "prompt": "?", "text": text, **more}) + "\n"


def test_what_a_file_lacks_is_on_the_screen(tmp_path: Path, capsys):
    unreadable = {"metadata": {"error": "there is no image n1.jpg"}}
    lines = line("201307251", "no") + line("7", "no") + line("8", "no") + line("201640614", "", **unreadable)
    status, record = gqa_score(tmp_path, lines + line("201307251", "no") + '{"question_id": "20')
    printed = capsys.readouterr().out
    assert (status, record["score"]) == (0, 20)  # as the official tool has it
    assert printed.splitlines() == [
        "gqa: 20.0000 (exact match, %), incomplete:",
        "  3 of 5 questions have no answer: these count as wrong",
        "  2 answers are to no question here: they do not count",
        "  1 questions were not asked, as their image or video could not be read: they are wrong",
        "  1 line at the end is half written: it is left out",
        "  1 answers are to questions that others are to as well",
    ]
    assert len(record["incomplete"]) == 4


def test_nothing_is_said_of_a_whole_file(tmp_path: Path, capsys):
    status, record = gqa_score(tmp_path, "".join(line(row[0], row[3]) for row in data_gqa.QUESTIONS))
    assert (status, record["score"], record["incomplete"]) == (0, 100, [])
    assert capsys.readouterr().out == "gqa: 100.0000 (exact match, %)\n"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(True, "yes"), "has the question_id True: it must be a text or a whole number"),
        (line(1.5, "yes"), "has the question_id 1.5"),
        (line("1", ["yes"]), 'has ["yes"] where a text should be'),
        (line("1", {"a": "yes"}), 'has {"a": "yes"} where a text should be'),
        (line("1", False), "has false where a text should be"),
        (line("1", "yes").replace('"?"', '["?"]'), 'has ["?"] where a text should be'),
        ("{oops\n", "is damaged"),
    ],
)
def test_lines_that_are_no_answers(bad: str, message: str, tmp_path: Path, capsys):
    """They are named, with what to do; and that is never to throw the others away."""
    status, _ = gqa_score(tmp_path, line("201307251", "no") + bad + line("20602949", "no"))
    said = capsys.readouterr().err
    assert status == 2 and "line 2 of" in said and message in said
    assert "delete the file" not in said


def test_lines_are_named_by_their_number_in_the_file(tmp_path: Path, capsys):
    """Empty ones count. And a list that is cut off is no line."""
    assert gqa_score(tmp_path / "lines", "\n\n" + line("201307251", "no") + "{oops\n")[0] == 2
    assert "line 4 of" in capsys.readouterr().err
    assert gqa_score(tmp_path / "list", "[" + line("201307251", "no").strip() + ', {"question_')[0] == 2
    assert "answers.jsonl begins as a json list, but is none" in capsys.readouterr().err


def test_texts_of_one_object(tmp_path: Path, capsys):
    status, _ = gqa_score(tmp_path, json.dumps({"201307251": ["no"]}))
    assert status == 2 and """entry '201307251' of""" in capsys.readouterr().err

"""LLaVA-Bench: what the judge sees, how its ratings are read, and the official numbers of files of reviews."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import data_llavabench
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer

from eval.benchmarks.llavabench import BENCHMARK, graded
from eval.reading.tables import Tables
from eval.records import Answer
from eval.scoring.judge import Judge, api_judge, exact_judge
from eval.scoring.llavabench_judge import RULE, rating_of

TEXTS = ["It is red .", "A big red field", "Paint", "There are no people to be seen in this picture"]


@pytest.fixture
def server(serve: Callable[..., JudgeServer], hurried: None) -> JudgeServer:
    return serve(data_llavabench.review)


@pytest.fixture
def judge(server: JudgeServer, tmp_path: Path) -> Judge:
    return api_judge("gpt-4-0314", tmp_path / "cache")


def answers_of(texts: list[str]) -> list[Answer]:
    return [Answer(number, text) for number, text in enumerate(texts)]


def write_reviews(path: Path, ratings: list[tuple[str, list[float]]]) -> Path:
    """As LLaVA's eval_gpt_review_bench.py writes them."""
    lines = [
        {
            "id": number + 1,
            "question_id": number,
            "answer1_id": "a",
            "answer2_id": "b",
            "category": f"llava_bench_{category}",
            "content": "…",
            "tuple": own,
        }
        for number, (category, own) in enumerate(ratings)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Data


def test_both_ways_give_the_same(folder: Path, tables: Tables):
    ours, theirs = BENCHMARK.from_folder(folder), BENCHMARK.from_tables(tables)
    assert [(one.id, one.text, one.category) for one in ours] == [(one.id, one.text, one.category) for one in theirs]
    assert (ours[0].id, ours[0].text, ours[0].category) == (0, "What is the color of the field?", "conv")
    assert ours[3].visuals[0].path == folder / "images" / "002.jpg"
    for one, other in zip(ours, theirs, strict=True):
        assert one.visuals[0].open()[0].tobytes() == other.visuals[0].open()[0].tobytes()
    truth = BENCHMARK.truth_from_folder(folder)
    assert truth == BENCHMARK.truth_from_tables(tables)
    assert truth["3"].context == "A blue field.\nIt is flat." and truth["3"].reference == "There are none."


def test_a_context_of_several_captions_has_a_line_for_each(folder: Path):
    rows = [{"image": image, "caption": ["first", "second"]} for image in data_llavabench.CAPTIONS]
    (folder / "context.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert BENCHMARK.truth_from_folder(folder)["0"].context == "first\nsecond"


def test_scoring_needs_no_images(folder: Path):
    for image in (folder / "images").iterdir():
        image.unlink()
    assert len(BENCHMARK.truth_from_folder(folder)) == 4


def test_bad_data(folder: Path):
    rows = (folder / "context.jsonl").read_text().splitlines()
    (folder / "context.jsonl").write_text(rows[0])
    with pytest.raises(ValueError, match=r"context.jsonl has no '002.jpg'"):
        BENCHMARK.truth_from_folder(folder)
    (folder / "answers_gpt4.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"answers_gpt4\.jsonl"):
        BENCHMARK.truth_from_folder(folder)
    questions = folder / "questions.jsonl"
    whole = questions.read_text()
    questions.write_text(whole + whole)
    with pytest.raises(ValueError, match="more than once"):
        BENCHMARK.from_folder(folder)
    questions.write_text(whole.replace("detail", "details", 1))
    with pytest.raises(ValueError, match=r"line 2 of .*'details': known are conv, detail, complex"):
        BENCHMARK.from_folder(folder)


# The judge


def test_what_the_judge_is_asked(folder: Path, judge: Judge, server: JudgeServer):
    BENCHMARK.score([Answer("3", "Nobody.")], BENCHMARK.truth_from_folder(folder), judge)
    assert server.asked == [
        {
            "model": "gpt-4-0314",
            "messages": [
                {
                    "role": "system",
                    "content": "You are a helpful and precise assistant for checking the quality of the answer.",
                },
                {
                    "role": "user",
                    "content": "[Context]\nA blue field.\nIt is flat.\n\n[Question]\nHow many people are there?\n\n"
                    "[Assistant 1]\nThere are none.\n\n[End of Assistant 1]\n\n"
                    f"[Assistant 2]\nNobody.\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n",
                },
            ],
            "temperature": 0.2,
            "max_tokens": 1024,
        }
    ]
    lines = RULE.split("\n")
    assert len(lines) == 4 and lines[0].endswith("describing the image. ")  # with its blank
    assert lines[2].startswith("Please first output a single line") and lines[3].endswith("affect your judgment.")


@pytest.mark.parametrize(
    ("review", "rating"),
    [
        ("8 7\nBoth are good.", (8, 7)),
        ("8,7", (8, 7)),
        ("8.5 10", (8.5, 10)),
        ("8 7\r\nBoth", (8, 7)),
        ("8, 7", None),  # comma and blank are two blanks
        ("8  7", None),
        (" 8 7", None),
        ("8 7 ", None),
        ("8 7 9", None),
        ("8", None),
        ("8/10 7/10", None),
        ("Assistant 1: 8", None),
        ("\n8 7", None),
        ("", None),
        ("nan 7", None),
    ],
)
def test_ratings(review: str, rating: tuple[float, float] | None):
    assert rating_of(review) == rating


def test_score(folder: Path, judge: Judge, server: JudgeServer):
    """By hand: (8, 6), (8, 6), (-1, -1), (8, 9): means 5.75 and 5.0; the complex ones 3.5 and 4.0."""
    result = BENCHMARK.score(answers_of(TEXTS), BENCHMARK.truth_from_folder(folder), judge)
    assert result.score == 87.0 == data_llavabench.reviewed(TEXTS) and "gpt-4-0314" in result.metric
    assert result.parts == {"complex": 114.3, "conv": 75.0, "detail": 75.0}
    assert result.details["categories"]["all"] == {"relative": 87.0, "gpt4": 57.5, "model": 50.0, "reviews": 4}
    assert (result.details["unjudged"], result.details["reviews"], result.details["missing"]) == (1, 4, 0)
    assert "INCOMPLETE: no readable reply of the judge about 1 of 4 answers, which count as rated -1" in result.metric
    assert len(server.asked) == 3 + 5  # what cannot be read is asked again; at last it counts as (-1, -1)
    BENCHMARK.score(answers_of(TEXTS), BENCHMARK.truth_from_folder(folder), judge)
    assert len(server.asked) == 3 + 10


def test_reviews_without_ratings(folder: Path, server: JudgeServer, judge: Judge):
    """-1 over -1 is no 100 %: not of all reviews, and not of the only one in a category."""
    truth = BENCHMARK.truth_from_folder(folder)
    with pytest.raises(ValueError, match=r"none of the replies of the judge gpt-4-0314 .*cache/unreadable/.*\.json"):
        BENCHMARK.score([Answer(2, "Paint")], truth, judge)
    result = BENCHMARK.score(answers_of(TEXTS)[:3], truth, judge)
    assert result.parts == {"conv": 75.0, "detail": 75.0}
    assert result.details["categories"]["complex"] == {"relative": None, "gpt4": -10.0, "model": -10.0, "reviews": 1}


@pytest.mark.parametrize("reply", ["busy", "```\n8 7\n```", "Assistant 1 is better.", ""])
def test_a_judge_without_ratings(folder: Path, reply: str):
    """Any judge, whatever it does with replies; and one image more that could not be read is no rating either."""
    truth = BENCHMARK.truth_from_folder(folder)
    silent = SimpleNamespace(model="m", exact=False, ask=lambda requests, parse: [parse(reply) for _ in requests])
    lost = Answer(3, "", "", {"error": "there is no image"})
    for answers in (answers_of(TEXTS), [*answers_of(TEXTS)[:3], lost]):
        with pytest.raises(ValueError, match=r"none of the [34] reviews of the judge m has ratings.*another judge"):
            BENCHMARK.score(answers, truth, silent)


def test_answers_that_are_missing_repeated_or_to_nothing(folder: Path, judge: Judge):
    """Only the answers that there are are reviewed; of two to a question, the last."""
    answers = [Answer(0, "red"), Answer("0", "It is red ."), Answer(99, "?")]
    result = BENCHMARK.score(answers, BENCHMARK.truth_from_folder(folder), judge)
    assert result.score == 75.0
    details = result.details
    assert (details["missing"], details["unexpected"], details["repeated"], details["reviews"]) == (3, 1, 1, 1)
    with pytest.raises(ValueError, match="none of the 1 answers"):
        BENCHMARK.score([Answer(99, "?")], BENCHMARK.truth_from_folder(folder), judge)


def test_images_that_could_not_be_read(folder: Path, judge: Judge, server: JudgeServer):
    """0 beside GPT-4's 10 without asking the judge: (8, 6) and (10, 0) are 3 of 9, 33.3 %."""
    answers = [Answer(0, "It is red ."), Answer(1, "", "", {"error": "there is no image"})]
    result = BENCHMARK.score(answers, BENCHMARK.truth_from_folder(folder), judge)
    assert result.score == 33.3
    assert (result.details["unreadable"], result.details["unjudged"], len(server.asked)) == (1, 0, 1)
    assert "INCOMPLETE" not in result.metric


def test_there_is_no_proxy(folder: Path):
    with pytest.raises(ValueError, match="hence no --judge exact: name a language model"):
        BENCHMARK.score(answers_of(TEXTS), BENCHMARK.truth_from_folder(folder), exact_judge())
    with pytest.raises(ValueError, match="needs a judge"):
        BENCHMARK.score(answers_of(TEXTS), BENCHMARK.truth_from_folder(folder), None)


# Files of reviews


def test_official_numbers(tmp_path: Path):
    """By hand; the means are rounded to three digits before they are divided, and -1 is in them."""
    ratings = [
        *[("conv", [8, 7]), ("conv", [9, 4]), ("conv", [8.5, 3])],
        *[("detail", [9, 6]), ("detail", [-1, -1])],
        *[("complex", [8, 9])],
    ]
    result = graded(write_reviews(tmp_path / "reviews.jsonl", ratings))
    assert result.details["categories"] == {
        "all": {"relative": 67.5, "gpt4": 69.2, "model": 46.7, "reviews": 6},  # 6.917, 4.667: 67.47 %
        "complex": {"relative": 112.5, "gpt4": 80.0, "model": 90.0, "reviews": 1},
        "conv": {"relative": 54.9, "gpt4": 85.0, "model": 46.7, "reviews": 3},  # 8.5, 4.667: 54.91 %
        "detail": {"relative": 62.5, "gpt4": 40.0, "model": 25.0, "reviews": 2},
    }
    assert result.score == 67.5 and result.details["unjudged"] == 1
    assert "INCOMPLETE: no readable reply of the judge about 1 of 6 answers" in result.metric
    assert list(result.parts) == ["complex", "conv", "detail"]
    assert graded(tmp_path / "reviews.jsonl", tmp_path).score == 67.5


def test_the_two_roundings_can_be_seen(tmp_path: Path):
    """8 / 3 is 2.667 and 22 / 3 is 7.333: 36.4 %; and 0.0625 becomes 0.062, a twentieth of a point less."""
    rounded = graded(write_reviews(tmp_path / "a.jsonl", [("conv", [a, b]) for a, b in ((7, 2), (7, 3), (8, 3))]))
    assert rounded.score == 36.4
    sixteenth = [("conv", [1, 1 if number == 0 else 0]) for number in range(16)]
    assert graded(write_reviews(tmp_path / "b.jsonl", sixteenth)).score == 6.2  # 6.25 without the first rounding
    assert np.round(100 / 16, 2) == 6.25


ratings = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=60)


@given(ratings)
def test_the_printed_ratio_follows_from_the_printed_means(ratings: list[tuple[int, int]]):
    """Integers up to 60: the sums are exact, so the formula can be written down with them."""
    with tempfile.TemporaryDirectory() as name:
        result = graded(write_reviews(Path(name) / "r.jsonl", [("conv", list(own)) for own in ratings]))
    gpt4, model = (round(sum(values) / len(ratings), 3) for values in zip(*ratings, strict=True))
    assert result.score == round(model / gpt4 * 100, 1) == result.parts["conv"]
    assert result.details["categories"]["all"]["gpt4"] == round(gpt4 * 10, 1)


def test_reviews_without_category_count_for_all(tmp_path: Path):
    """As older files of reviews are read."""
    lines = [{"category": "llava_bench_conv", "tuple": [8, 4]}, {"tuple": [8, 8]}, {"score": [8, 6]}]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = graded(tmp_path / "reviews.jsonl")
    assert result.score == 75.0 and result.parts == {"conv": 50.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"category": "llava_bench_conv"}', "line 1 of .* has no 'tuple'"),
        ('{"category": "llava_bench_conv", "tuple": [8]}', r"ratings \[8\], where two numbers"),
        ('{"category": "llava_bench_conv", "tuple": "8 7"}', "ratings '8 7', where two numbers"),
        ('{"category": "llava_bench_conv", "tuple": [0, 7]}', "0 on average"),
        ('{"category": "llava_bench_conv", "tup', "line 1 of .* is damaged"),
        ("", "no reviews"),
        ('{"category": "llava_bench_conv", "tuple": [-1, -1]}', "none of the 1 reviews of .*reviews.jsonl has ratings"),
    ],
)
def test_bad_reviews(tmp_path: Path, line: str, message: str):
    (tmp_path / "reviews.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        graded(tmp_path / "reviews.jsonl")

"""MME: how answers are read, how right answers are found, the subtasks' scores, and the data both ways."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import data_mme as data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmarks.mme import BENCHMARK, COGNITION, PERCEPTION, read_answer
from eval.reading.tables import Tables
from eval.records import Answer, Question


def answered(texts: list[str]) -> list[Answer]:
    return [Answer(row[0], text, row[1] + data.SHORT) for row, text in zip(data.ROWS, texts, strict=True)]


TRUTH = {
    (name.split("/", 1)[0], Path(name).stem, question + blanks + data.YES_OR_NO): answer.lower()
    for name, question, blanks, answer in data.ROWS
}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("No.", "no"),
        ("yes, it is", "yes"),
        ("not", "no"),  # holds it
        ("I know", "other"),  # from the fifth character on nothing counts
        ("yno", "no"),
        ("noyes", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("A: yes", "other"),
        ("", "other"),
        ("y", "other"),
    ],
)
def test_reading_of_answers(text: str, read: str):
    assert read_answer(text) == read


def test_questions_of_the_folder(folder: Path):
    questions = BENCHMARK.from_folder(folder)
    assert [question.id for question in questions] == [row[0] for row in data.ROWS]
    assert questions[1].text == (
        "Is a c++ code shown in the picture?\nAnswer the question using a single word or phrase."
    )
    assert [question.category for question in questions[::2]] == [
        "code_reasoning",
        "existence",
        "existence",
        "landmark",
    ]
    (visual,) = questions[7].visuals
    assert visual.path == folder / "MME_Benchmark_release_version/landmark/images/00d5eb99f0c5a4b5.jpg"
    assert visual.open()[0].size == (36, 28) and visual.key == questions[6].visuals[0].key


def test_questions_of_the_tables(folder: Path, tables: Tables):
    """As the folder's, also where the hub's question has two blanks; its ids may lack the folder ``images``."""

    def told(question: Question) -> tuple:
        return question.id.replace("/images", ""), question.text, question.category

    questions = BENCHMARK.from_tables(tables)
    assert list(map(told, questions)) == list(map(told, BENCHMARK.from_folder(folder)))
    keys = [question.visuals[0].key for question in questions]
    assert keys[0] == keys[1] and len(set(keys)) == 4
    assert questions[7].visuals[0].open()[0].size == (36, 28)


def test_truth_three_ways(folder: Path, tables: Tables):
    assert BENCHMARK.truth_from_folder(folder) == BENCHMARK.truth_from_tables(tables) == TRUTH
    shutil.rmtree(folder / "MME_Benchmark_release_version")
    with pytest.raises(FileNotFoundError, match=r"no right answers.*eval_tool/Your_Results"):
        BENCHMARK.truth_from_folder(folder)
    data.write_results(folder.parent)
    assert BENCHMARK.truth_from_folder(folder) == TRUTH


def test_an_archive_that_unpacks_a_level_deeper(folder: Path):
    """With the official tool and a note beside, neither of which are questions."""
    release = folder / "MME_Benchmark_release_version"
    release.rename(folder / "MME_Benchmark")
    release.mkdir()
    (folder / "MME_Benchmark").rename(release / "MME_Benchmark")
    data.write_results(folder.parent)
    (folder / "eval_tool").rename(release / "eval_tool")
    (release / "eval_tool" / "readme.txt").write_text("python calculation.py --results_dir LaVIN")
    assert BENCHMARK.truth_from_folder(folder) == TRUTH
    shutil.rmtree(release / "MME_Benchmark")
    assert BENCHMARK.truth_from_folder(folder) == TRUTH


def test_result_files_with_an_answer(folder: Path):
    """The official tool's own example has a fourth column."""
    shutil.rmtree(folder / "MME_Benchmark_release_version")
    (folder / "eval_tool" / "Your_Results").mkdir(parents=True)
    line = "0020.png\tIs a python code shown in the picture? Please answer yes or no.\tYes\tNo, it is not\n\n"
    (folder / "eval_tool" / "Your_Results" / "code_reasoning.txt").write_text(line)
    found = BENCHMARK.truth_from_folder(folder)
    assert found == {
        ("code_reasoning", "0020", "Is a python code shown in the picture? Please answer yes or no."): "yes"
    }


TEXTS = ["Yes", "No", "Yes", "No.", "yes", "Yes", "banana", "no way"]
# code_reasoning 2/2 and 1/1; existence 3/4 and 1/2; landmark 1/2 and 0/1


def test_score():
    result = BENCHMARK.score(answered(TEXTS), TRUTH, None)
    assert result.details["subtasks"] == {
        "existence": _subtask(score=125.0, acc=75.0, acc_plus=50.0, questions=4, images=2),
        "landmark": _subtask(score=50.0, acc=50.0, acc_plus=0.0, questions=2, images=1, other=1),
        "code_reasoning": _subtask(score=200.0, acc=100.0, acc_plus=100.0, questions=2, images=1),
    }
    assert result.parts == {"perception": 175.0, "cognition": 200.0}
    assert result.score == 375.0 == data.expected(TEXTS)
    names = ("perception", "cognition", "missing", "unexpected", "repeated", "neither_yes_nor_no")
    assert [result.details[name] for name in names] == [175.0, 200.0, 0, 0, 0, 1]
    assert len(result.details["missing_subtasks"]) == 11 and result.points is None


def _subtask(**figures: float) -> dict[str, float]:
    return {"incomplete_images": 0, "other": 0, **figures}


def test_score_of_llava_13b():
    """Sizes of all subtasks and the counts behind its official subscores, which add to 1531.3187 and 295.3571."""
    sizes = [*(60, 60, 60, 60, 294, 340, 400, 400, 400, 40), *(140, 40, 40, 40)]
    scores = [185.0, 155.0, 133.33, 170.0, 160.54, 152.94, 161.25, 170.5, 117.75, 125.0, 127.86, 42.5, 77.5, 47.5]
    truth, answers, shown = {}, [], []
    for subtask, size, target in zip(PERCEPTION + COGNITION, sizes, scores, strict=True):
        images = size // 2
        # right answers r and images with two w give 100 r / size + 200 w / size: of those that fit, the first
        right, whole = next(
            (right, whole)
            for right in range(size + 1)
            for whole in range(right // 2 + 1)
            if right - 2 * whole <= images - whole and round(100 * right / size + 200 * whole / size, 2) == target
        )
        shown.append((subtask, target))
        for image in range(images):
            correct = 2 if image < whole else 1 if image < right - whole else 0
            for number, gold in enumerate(("yes", "no")):
                truth[subtask, str(image), f"{number}? Please answer yes or no."] = gold
                text = gold.capitalize() if number < correct else "?"
                answers.append(Answer(f"{subtask}/{image}.jpg", text, f"{number}?{data.SHORT}"))
    result = BENCHMARK.score(answers, truth, None)
    assert [(name, round(figures["score"], 2)) for name, figures in result.details["subtasks"].items()] == shown
    assert round(result.details["perception"], 4) == 1531.3187
    assert round(result.details["cognition"], 4) == 295.3571
    assert round(result.score, 1) == 1826.7
    assert result.details["questions"] == 2374


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["Yes", "No", "no.", "", "maybe", "yes\nno"]), min_size=8, max_size=8), st.randoms())
def test_order_does_not_matter(texts: list[str], random):
    shuffled = answered(texts)
    random.shuffle(shuffled)
    assert BENCHMARK.score(shuffled, TRUTH, None).score == pytest.approx(data.expected(texts))


def test_missing_answers():
    """They count in no share, nor does an image that lacks one in accuracy+; all is reported."""
    answers = [
        *answered(TEXTS)[:5],
        Answer("existence/1.jpg", "Yes", "Is it?"),
        Answer("OCR/0001.jpg", "No\n", "Is it?"),
    ]
    result = BENCHMARK.score(answers, TRUTH, None)
    figures = {"score": 200.0, "acc": 100.0, "acc_plus": 100.0, "questions": 3, "images": 1, "incomplete_images": 1}
    assert result.details["subtasks"]["existence"] == {**figures, "other": 0}
    assert result.score == 400.0
    names = ("answers", "missing", "unexpected", "line_breaks_or_tabs")
    assert [result.details[name] for name in names] == [7, 3, 2, 1]
    assert "landmark" in result.details["missing_subtasks"]
    with pytest.raises(ValueError, match=r"none of the 1 answers .* is to one of the 8 questions"):
        BENCHMARK.score(answers[-1:], TRUTH, None)


def test_repeated_answers_are_counted():
    result = BENCHMARK.score([*answered(TEXTS), answered(TEXTS)[0]], TRUTH, None)
    assert result.details["repeated"] == 1 and result.details["missing"] == 0


def test_prompts_that_ask_for_yes_or_no_themselves():
    answers = [
        dataclasses.replace(answer, prompt=f"{row[1]} {data.YES_OR_NO}")
        for answer, row in zip(answered(TEXTS), data.ROWS, strict=True)
    ]
    assert BENCHMARK.score(answers, TRUTH, None).score == 375.0


def test_bad_files(folder: Path):
    path = folder / "MME_Benchmark_release_version" / "existence" / "000000006040.txt"
    path.write_text("Is there a train in this image? Please answer yes or no.\n")
    with pytest.raises(ValueError, match=r"line 1 of .*000000006040\.txt has 1 fields"):
        BENCHMARK.truth_from_folder(folder)
    path.write_text("Is there a train in this image? Please answer yes or no.\tPerhaps\n")
    with pytest.raises(ValueError, match=r"'Perhaps', neither Yes nor No"):
        BENCHMARK.truth_from_folder(folder)
    path.write_bytes(b"\xff\xfe?\tYes\n")
    with pytest.raises(ValueError, match="no UTF-8"):
        BENCHMARK.truth_from_folder(folder)
    lines = (folder / "llava_mme.jsonl").read_text().splitlines()
    (folder / "llava_mme.jsonl").write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match="more than once"):
        BENCHMARK.from_folder(folder)

"""MMBench: rotations, the letter in an answer, both sources of data, and the Excel file."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import data_mmbench as data
import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmarks.mmbench import BENCHMARKS, Truth, letter, score, submit
from eval.reading.tables import Tables
from eval.records import Answer

BENCHMARK, CHINESE = BENCHMARKS
OPTIONS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


@pytest.fixture(scope="module", params=BENCHMARKS, ids=lambda benchmark: benchmark.name)
def benchmark_and_roots(request, tmp_path_factory):
    roots = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("tables")
    data.write_folder(roots[0], request.param.name)
    data.write_tables(roots[1], request.param.name)
    return request.param, *roots


def test_questions(benchmark_and_roots):
    """The same from both sources; rotations share the image."""
    benchmark, root, copy = benchmark_and_roots
    asked = benchmark.from_folder(root / benchmark.folder)
    again = benchmark.from_tables(Tables(benchmark.tables, copy))
    assert [dataclasses.replace(each, visuals=()) for each in asked] == [
        dataclasses.replace(each, visuals=()) for each in again
    ]
    assert [each.id for each in asked] == [
        241, 252, 260, 1000241, 1000252, 1000260, 2000241, 2000260, 3000241
    ]  # fmt: skip
    if benchmark is BENCHMARK:
        assert asked[3].text == (
            "A bar has two\nends.\nWhich one is shown?\nA. dog\nB. cow\nC. hen\nD. cat\n"
            "Answer with the option's letter from the given choices directly."
        )
        assert asked[1].prompt == 'Does "it" rain?\nA. yes\nB. no'
        assert asked[1].extra == {"round_id": 0, "options": ["yes", "no"], "option_char": ["A", "B"]}
        assert asked[1].category == "image_scene"
    else:
        assert asked[1].text == "下雨了吗？\nA. 是\nB. 否\n请直接回答选项字母。"  # noqa: RUF001
    for questions in (asked, again):
        keys = [question.visuals[0].key for question in questions]
        assert len({*keys}) == 3 and keys[0] == keys[3] == keys[6] == keys[8]
        assert questions[4].visuals[0].open()[0].size == (24, 16)


def test_truth_is_the_same_from_both_sources(benchmark_and_roots):
    benchmark, root, copy = benchmark_and_roots
    answers = [Answer(row["index"], "ABBA"[number % 4]) for number, row in enumerate(data.rows(benchmark.name))]
    truths = (
        benchmark.truth_from_folder(root / benchmark.folder),
        benchmark.truth_from_tables(Tables(benchmark.tables, copy)),
    )
    assert truths[0].name == data.FILES[benchmark.name].removesuffix(".tsv")
    assert truths[1].name == f"{benchmark.name}_dev"
    assert score(answers, truths[0]) == score(answers, truths[1])


def made(*rows: tuple[int, str], category: str = "one") -> Truth:
    """Rows of an index and an answer."""
    cells = {"question": "?", "hint": None, **OPTIONS, "category": category, "l2-category": "LR", "split": "dev"}
    return Truth("made", [{**cells, "index": index, "answer": answer} for index, answer in rows])


def test_a_question_is_right_if_all_its_rotations_are():
    """Two questions with three and two rows: the first has one wrong row."""
    truth = made((1, "A"), (1000001, "B"), (2000001, "C"), (2, "D"), (1000002, "A"))
    said = {1: "A", 1000001: "B", 2000001: "A", 2: "D", 1000002: "A"}
    result = score([Answer(str(index), text) for index, text in reversed(said.items())], truth)
    assert result.score == 50
    assert result.details["all_rows"] == pytest.approx(80)
    assert result.details["first_rotation"] == 100
    assert result.points == [0, 1]
    assert result.parts == {"LR": 50}
    assert result.details["base_questions"] == 2
    assert (result.details["missing"], result.details["undecided"]) == (0, 0)


def test_the_published_shape():
    """1,176 questions in 4,377 rows, as in LLaVA's file: 796 right ones are the 67.69 of LLaVA-1.5-13B."""
    sizes = [4] * 938 + [3] * 149 + [2] * 89
    truth = made(*((base + turn * 1_000_000, "ABCD"[turn]) for base, size in enumerate(sizes) for turn in range(size)))
    assert len(truth.rows) == 4377
    wrong = {*random.Random(0).sample(range(1176), 380)}
    answers = [Answer(row["index"], "E" if row["index"] - 1_000_000 in wrong else row["answer"]) for row in truth.rows]
    result = score(answers, truth)
    assert f"{result.score:.2f}" == "67.69"
    assert sum(result.points) == 796
    assert result.details["first_rotation"] == 100


def test_rows_without_an_answer_are_wrong():
    result = score([Answer(1, "A"), Answer(7, "A")], made((1, "A"), (1000001, "B"), (2, "A")))
    assert result.score == 0
    assert (result.details["missing"], result.details["unexpected"]) == (2, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("A", "A"),
        ("E", "E"),
        ("A.", "A"),
        ("B. rabbit", "B"),
        ("(C)", "C"),
        ("It is (C).", "C"),
        ("Answer :D", "D"),
        ("The answer is B", "B"),
        ("A cute teddy bear", "A"),  # by its text: A may be an article among more than three words
        ("A big brown thing B.", "B"),  # ... and then the decorated forms are tried
        ("A big brown thing", None),
        ("A or B", None),
        ("a RABBIT", "B"),
        ("a cat and a dog", None),
        ("Spider", None),
        ("", None),
    ],
)
def test_letter(text, expected):
    assert letter(text, OPTIONS) == expected


@settings(deadline=None)
@given(st.sampled_from("ABCDE"))
def test_bare_letters_are_themselves(name):
    assert letter(name, OPTIONS) == letter(f" {name}\n", OPTIONS) == name


def test_undecided_answers_are_wrong_and_counted():
    result = score([Answer(1, "Spider"), Answer(2, "a rabbit")], made((1, "A"), (2, "B")))
    assert (result.score, result.details["undecided"]) == (50, 1)


@pytest.mark.parametrize(
    "texts", [["B"] * 9, ["B", "A", "C", "A", "B", "B", "D", "A", "C"], ["a dog", "yes."] * 4 + [""]]
)
def test_expected_agrees(texts, tmp_path: Path):
    data.write_folder(tmp_path)
    truth = BENCHMARK.truth_from_folder(tmp_path / BENCHMARK.folder)
    answers = [Answer(row["index"], text) for row, text in zip(data.rows(), texts, strict=True)]
    assert score(answers, truth).score == pytest.approx(data.expected(texts))


def test_expected_is_right():
    assert data.expected(["B", "A", "C", "A", "B", "B", "D", "A", "C"]) == 100


def test_an_image_may_be_the_number_of_another_row(tmp_path: Path):
    records = data.rows()
    for row in records:
        if row["index"] > 1_000_000:
            row["image"] = str(row["index"] % 1_000_000)
    data.write_tsv(tmp_path / "mmbench_dev_20230712.tsv", records)
    asked = BENCHMARK.from_folder(tmp_path)
    assert asked[3].visuals[0] is asked[0].visuals[0]
    assert asked[3].visuals[0].open()[0].getpixel((0, 0))[0] == pytest.approx(241, abs=4)


def test_empty_cells_as_pandas_reads_them(tmp_path: Path):
    """An option that says None ends the list, in LLaVA's script, too."""
    records = data.rows()
    records[0] |= {"hint": "N/A", "B": "None"}
    data.write_tsv(tmp_path / "mmbench_dev_20230712.tsv", records)
    assert BENCHMARK.from_folder(tmp_path)[0].prompt == "Which one is shown?\nA. cat"


def test_submission(tmp_path: Path):
    """The columns of LLaVA's converter; an answer that looks like a formula stays text."""
    data.write_folder(tmp_path)
    truth = BENCHMARK.truth_from_folder(tmp_path / "mmbench")
    answers = [Answer("241", "B"), Answer("1000252", "=1+1\x07")]
    path = submit(answers, truth, tmp_path / "upload")
    assert path == tmp_path / "upload" / "mmbench_dev_20230712.xlsx"
    rows = list(openpyxl.load_workbook(path).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (241, "Which one is shown?", "cat", "dog", "cow", "hen", "B", "B", "dev")
    assert rows[2] == (252, 'Does "it" rain?', "yes", "no", None, None, None, "A", "dev")
    assert rows[5][6] == "=1+1"
    assert len(rows) == 10


def test_the_test_split_can_only_be_submitted(tmp_path: Path):
    records = [{column: cell for column, cell in row.items() if column != "answer"} for row in data.rows()]
    data.write_tsv(tmp_path / "mmbench_test_20230712.tsv", [{**row, "split": "test"} for row in records])
    truth = BENCHMARK.truth_from_folder(tmp_path)
    assert len(BENCHMARK.from_folder(tmp_path)) == 9
    with pytest.raises(ValueError, match="mmbench_test_20230712 has no answers"):
        score([Answer(241, "A")], truth)
    path = submit([Answer(241, "A")], truth, tmp_path)
    rows = list(openpyxl.load_workbook(path).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert rows[1] == (241, "Which one is shown?", "cat", "dog", "cow", "hen", "A", "test")


def test_bad_data(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"mmbench_dev_20230712\.tsv"):
        BENCHMARK.from_folder(tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text("")
    with pytest.raises(ValueError, match="is no readable TSV"):
        BENCHMARK.truth_from_folder(tmp_path)
    path.write_text("index\tquestion\n1\twhy\n")
    with pytest.raises(ValueError, match="has no 'hint'"):
        BENCHMARK.truth_from_folder(tmp_path)
    records = data.rows()
    records[1]["index"] = "here"
    data.write_tsv(path, records)
    with pytest.raises(ValueError, match=r"row 1 of .* has the index 'here', not a number"):
        BENCHMARK.truth_from_folder(tmp_path)
    records[1]["index"] = 241
    data.write_tsv(path, records)
    with pytest.raises(ValueError, match=r"more than once \(241\)"):
        BENCHMARK.from_folder(tmp_path)
    records[1] |= {"index": 252, "image": "abc"}
    data.write_tsv(path, records)
    with pytest.raises(ValueError, match="image of index 252 is no base64"):
        BENCHMARK.from_folder(tmp_path)[1].visuals[0].open()

"""POPE: how answers are read, positions of labels, F1, and the data both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import data_pope as data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmarks.pope import BENCHMARK, Label, says_yes
from eval.reading import sources
from eval.reading.tables import Tables
from eval.records import Answer, Question


def test_the_questions_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """For the questions and for their labels; once more when it has changed."""
    read, opened = sources._text, list[str]()
    monkeypatch.setattr(sources, "_text", lambda path: opened.append(path.name) or read(path))
    questions, truth = BENCHMARK.from_folder(folder), BENCHMARK.truth_from_folder(folder)
    assert opened.count("llava_pope_test.jsonl") == 1 and list(truth) == [str(question.id) for question in questions]
    file = folder / "llava_pope_test.jsonl"
    file.write_text(file.read_text().replace("snowboard", "sledge"))
    assert "sledge" in BENCHMARK.from_folder(folder)[0].text and opened.count(file.name) == 2


def answered(texts: list[str], spell: type = int) -> list[Answer]:
    return [
        Answer(spell(number), text, question + data.SHORT)
        for (number, _, _, question, _), text in zip(data.ROWS, texts, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("NO", True),  # only three spellings are known
        ("There is not one", False),
        ("No, there is none", False),  # commas go
        ("no.", False),
        ("Yes. No", True),  # the first sentence alone
        ("It is nothing", True),  # whole words
        ("I do\nnot see", True),  # words are parted by blanks alone
        ("No\nyes", True),
        ("n,o", False),  # a comma goes without a trace
        ("", True),
        ("banana", True),
        (".No", True),
    ],
)
def test_reading_of_answers(text: str, yes: bool):
    assert says_yes(text) is yes


def test_questions_of_the_folder(folder: Path):
    questions = BENCHMARK.from_folder(folder)
    assert [question.id for question in questions] == [1, 2, 3, 20000001, 20000002, 10000001, 10000002, 10000003]
    assert questions[2].text == (
        "Is there an umbrella in the imange?\nAnswer the question using a single word or phrase."
    )
    assert questions[3].category == "popular" and questions[3].prompt is None
    (visual,) = questions[2].visuals
    assert visual.path == folder / "val2014" / "COCO_val2014_000000210789.jpg"
    (image,) = visual.open()
    assert image.size == (40, 30) and image.getpixel((5, 5))[2] > 150
    assert questions[0].visuals[0].key == questions[5].visuals[0].key != visual.key


def test_questions_of_the_tables(folder: Path, tables: Tables):
    """As the folder's, but for the wording that POPE has corrected since; ids do not repeat as the hub's do."""

    def told(question: Question) -> tuple:
        return question.id, question.text.replace("imange", "image"), question.category

    questions = BENCHMARK.from_tables(tables)
    assert list(map(told, questions)) == list(map(told, BENCHMARK.from_folder(folder)))
    keys = [question.visuals[0].key for question in questions]
    assert len(set(keys)) == 2 and keys[0] == keys[3] == keys[5]  # an image in all three splits
    assert questions[7].visuals[0].open()[0].getpixel((5, 5))[2] > 150


def test_truth(folder: Path, tables: Tables):
    truth = BENCHMARK.truth_from_folder(folder)
    assert truth["10000002"] == Label("random", "Is there a bed in the image?", False)
    assert [name for name, label in truth.items() if label.yes] == ["1", "20000001", "10000001", "10000003"]
    hub = BENCHMARK.truth_from_tables(tables)
    assert {name: (label.category, label.yes) for name, label in hub.items()} == {
        name: (label.category, label.yes) for name, label in truth.items()
    }
    (folder / "llava_pope_test.jsonl").unlink()
    assert BENCHMARK.truth_from_folder(folder) == truth


def test_labels_belong_to_questions_by_position(folder: Path):
    """Whatever ids the questions have, as the official scorer does."""
    path = folder / "llava_pope_test.jsonl"
    path.write_text(path.read_text().replace('"question_id": 3,', '"question_id": "third",'))
    truth = BENCHMARK.truth_from_folder(folder)
    assert truth["third"].question == "Is there an umbrella in the imange?" and "3" not in truth


TEXTS = ["Yes", "Yes", "No", "yes, there is", "no", "No", "not at all", "Yes."]
# adversarial TP 1 FP 1 TN 1: 2/3; popular TP 1 TN 1: 1; random TP 1 TN 1 FN 1: 2/3


def test_score(folder: Path):
    result = BENCHMARK.score(answered(TEXTS), BENCHMARK.truth_from_folder(folder), None)
    assert result.parts == pytest.approx({"adversarial": 200 / 3, "popular": 100, "random": 200 / 3})
    assert result.score == pytest.approx(700 / 9) == data.expected(TEXTS)
    adversarial = result.details["categories"]["adversarial"]
    names = ("true_positives", "false_positives", "true_negatives", "false_negatives")
    assert [adversarial[name] for name in names] == [1, 1, 1, 0]
    assert adversarial["precision"] == 50 and adversarial["recall"] == 100
    assert adversarial["accuracy"] == adversarial["yes_ratio"] == pytest.approx(200 / 3)
    assert result.details["accuracy"] == pytest.approx((200 / 3 + 100 + 200 / 3) / 3)
    assert result.details["pooled_f1"] == pytest.approx(100 * 6 / 8)  # TP 3, FP 1, FN 1
    assert (result.details["missing"], result.details["unexpected"], result.points) == (0, 0, None)


def test_score_of_llava_13b():
    """Its published predictions' counts, with the numbers that LLaVA's scorer prints for them (benchmarks.md, 4.4)."""
    counts = {  # TP, FP, TN, FN
        "adversarial": (1182, 117, 1383, 318),
        "popular": (1182, 59, 1441, 318),
        "random": (1182, 31, 1379, 318),
    }
    truth, answers = {}, []
    for category, (hits, wrong, denied, missed) in counts.items():
        for label, text, number in (
            (True, "Yes", hits),
            (False, "Yes", wrong),
            (False, "No", denied),
            (True, "No", missed),
        ):
            for _ in range(number):
                truth[str(len(truth))] = Label(category, "", label)
                answers.append(Answer(len(answers), text))
    result = BENCHMARK.score(answers, truth, None)
    shown = {name: round(value, 2) for name, value in result.parts.items()}
    assert shown == {"adversarial": 84.46, "popular": 86.25, "random": 87.14}
    assert round(result.score, 3) == 85.947
    assert round(result.details["accuracy"], 2) == 86.98 and round(result.details["pooled_f1"], 2) == 85.93
    ratios = {name: round(figures["yes_ratio"], 1) for name, figures in result.details["categories"].items()}
    assert ratios == {"random": 41.7, "popular": 41.4, "adversarial": 43.3}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["Yes", "No", "no.", "", "not so", "Nope"]), min_size=8, max_size=8), st.randoms())
def test_order_and_type_of_ids_do_not_matter(texts: list[str], random):
    truth = {str(number): Label(category, text, label == "yes") for number, category, _, text, label in data.ROWS}
    shuffled = answered(texts, str)
    random.shuffle(shuffled)
    assert BENCHMARK.score(shuffled, truth, None).score == pytest.approx(data.expected(texts))


def test_missing_answers_do_not_move_the_others(folder: Path):
    """They are counted; a category without any is left out of the mean."""
    truth, answers = BENCHMARK.truth_from_folder(folder), answered(TEXTS)
    result = BENCHMARK.score([answers[0], *answers[2:5], Answer(99, "Yes")], truth, None)
    assert result.parts == {"adversarial": 100, "popular": 100} and result.score == 100
    assert (result.details["missing"], result.details["unexpected"]) == (4, 1)


def test_images_that_could_not_be_read_are_wrong(folder: Path):
    """Whatever is right; an empty answer alone would be a yes."""
    truth = BENCHMARK.truth_from_folder(folder)
    lost = [dataclasses.replace(answer, text="", extra={"error": "there is no image"}) for answer in answered(TEXTS)]
    result = BENCHMARK.score(lost, truth, None)
    assert (result.score, result.details["accuracy"], result.details["unreadable"]) == (0, 0, 8)


def test_labels_without_their_folder(folder: Path):
    """As a download of POPE's ``output/coco`` alone has them."""
    truth = BENCHMARK.truth_from_folder(folder)
    (folder / "llava_pope_test.jsonl").rename(folder / "coco" / "llava_pope_test.jsonl")
    assert BENCHMARK.truth_from_folder(folder / "coco") == truth


def test_no_hit_is_an_f1_of_zero(folder: Path):
    """There the official tool stops with a division by zero."""
    result = BENCHMARK.score(answered(["No"] * 8), BENCHMARK.truth_from_folder(folder), None)
    assert result.score == 0 and result.details["categories"]["random"]["precision"] == 0


def test_answers_to_other_questions(folder: Path):
    """Some are counted (the hub's wording differs in a few), most are an error."""
    truth, answers = BENCHMARK.truth_from_folder(folder), answered(TEXTS)
    answers[2] = dataclasses.replace(answers[2], prompt="Is there an umbrella in the image?" + data.SHORT)
    result = BENCHMARK.score(answers, truth, None)
    assert result.details["categories"]["adversarial"]["other_questions"] == 1
    assert result.score == pytest.approx(700 / 9)
    answers[1] = dataclasses.replace(answers[1], prompt="Is there a kite in the image?" + data.SHORT)
    with pytest.raises(ValueError, match=r"2 of 3 answers in the category adversarial .*'Is there a kite in the ima"):
        BENCHMARK.score(answers, truth, None)


def test_labels_of_another_version(folder: Path):
    """Today's POPE has 3000 random questions where LLaVA has 2910."""
    path = folder / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text() + json.dumps({"question_id": 4, "text": "Is there a cat?", "label": "no"}) + "\n")
    with pytest.raises(ValueError, match=r"coco_pope_random\.json has 4 labels for 3 questions .*e3e39262"):
        BENCHMARK.truth_from_folder(folder)


def test_bad_files(folder: Path):
    path = folder / "llava_pope_test.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match="1 ids more than once"):
        BENCHMARK.from_folder(folder)
    path.write_text(lines[0].replace("adversarial", "rare"))
    with pytest.raises(ValueError, match="category 'rare'"):
        BENCHMARK.from_folder(folder)
    path.write_text(lines[0].replace('"image"', '"picture"'))
    with pytest.raises(ValueError, match="no 'image'"):
        BENCHMARK.from_folder(folder)
    path.write_text("\n".join(lines))
    (folder / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"coco_pope_popular\.json"):
        BENCHMARK.truth_from_folder(folder)
    with pytest.raises(ValueError, match="no answers"):
        BENCHMARK.score([], {"1": Label("random", "", True)}, None)

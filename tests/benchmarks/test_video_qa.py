"""Questions about videos: data both ways, the prompt, the judge's messages and replies, and the score by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_video import DATA, expected, write_folder, write_tables

from eval.benchmark import Answer, Score
from eval.benchmarks import activitynet, msrvtt, msvd, tgif
from eval.judge import Request, exact_judge
from eval.sources import Tables
from eval.video_qa import Item, Verdict, graded, judge_request, parse_verdict, read_items, verdict_of

BENCHMARKS = {each.BENCHMARK.name: each.BENCHMARK for each in (tgif, msvd, msrvtt, activitynet)}
NAMES = list(BENCHMARKS)


def folder_of(root: Path, name: str) -> Path:
    write_folder(root, name)
    return root / BENCHMARKS[name].folder


def tables_of(root: Path, name: str) -> Tables:
    write_tables(root, name)
    return Tables(BENCHMARKS[name].tables, root)


class Scripted:
    """A judge that replies what it is told for each prediction, and keeps what it was asked."""

    model = "gpt-3.5-turbo"
    exact = False

    def __init__(self, replies: dict[str, str]) -> None:
        self.replies = replies
        self.asked: list[Request] = []

    def ask(self, requests: list[Request], parse: Callable[[str], Any]) -> list[Any]:
        self.asked += requests
        predictions = [each.messages[1]["content"].split("Predicted Answer: ")[1].split("\n\n")[0] for each in requests]
        return [parse(self.replies[prediction]) for prediction in predictions]


# Data


@pytest.mark.parametrize("name", NAMES)
def test_questions_of_a_folder(tmp_path: Path, name: str):
    questions = BENCHMARKS[name].from_folder(folder_of(tmp_path, name))
    rows = DATA[name].rows
    assert [question.id for question in questions] == [row[0] for row in rows]
    assert [question.prompt for question in questions] == [row[2] for row in rows]
    assert [question.category for question in questions] == [str(row[4]) for row in rows]
    for question, row in zip(questions, rows, strict=True):
        assert question.text == f"<image><image><image><image><image><image><image><image>\n{row[2]}"
        (video,) = question.visuals
        file, _, frames = DATA[name].files[row[1]]
        assert video.path == tmp_path / BENCHMARKS[name].folder / DATA[name].videos / file
        assert video.count == 8
        shown = [round((np.asarray(image).mean() - 10) / 20) for image in video.open()]
        assert shown == np.linspace(0, frames - 1, 8, dtype=int).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_tables_ask_the_same(tmp_path: Path, name: str):
    benchmark = BENCHMARKS[name]
    folder, tables = folder_of(tmp_path / "folder", name), tables_of(tmp_path / "tables", name)
    ours, theirs = benchmark.from_folder(folder), benchmark.from_tables(tables)
    for one, other in zip(ours, theirs, strict=True):
        assert replace(one, visuals=()) == replace(other, visuals=())
    for one, other in zip(ours, theirs, strict=True):
        images = zip(one.visuals[0].open(), other.visuals[0].open(), strict=True)
        assert all(first.tobytes() == second.tobytes() for first, second in images)
    assert benchmark.truth_from_tables(tables) == benchmark.truth_from_folder(folder)


@pytest.mark.parametrize("way", ["from_folder", "from_tables"])
@pytest.mark.parametrize("name", NAMES)
def test_questions_about_one_video_share_it(tmp_path: Path, name: str, way: str):
    source = (folder_of if way == "from_folder" else tables_of)(tmp_path, name)
    questions = getattr(BENCHMARKS[name], way)(source)
    videos = [row[1] for row in DATA[name].rows]
    keys = [question.visuals[0].key for question in questions]
    assert len(set(keys)) == len(set(videos)) == 3
    assert len(set(zip(keys, videos, strict=True))) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_video_is_said_when_it_is_its_turn(tmp_path: Path, name: str):
    """Before any work starts it is known by its path."""
    folder = folder_of(tmp_path, name)
    last = DATA[name].rows[3][1]
    (folder / DATA[name].videos / DATA[name].files[last][0]).unlink()
    *others, visual = (question.visuals[0] for question in BENCHMARKS[name].from_folder(folder))
    assert all(other.path is not None and other.path.is_file() for other in others)
    prefix = "v_" if name == "activitynet" else ""
    assert visual.path == folder / DATA[name].videos / f"{prefix}{last}.mp4"
    with pytest.raises(FileNotFoundError, match=f"there is no video {visual.path}"):
        visual.open()


def test_a_video_that_a_table_lacks(tmp_path: Path):
    write_tables(tmp_path / "msvd", "msvd")
    path = tmp_path / "msvd" / "data" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    cells = pa.array([None] * len(table), table.schema.field("video").type)
    pq.write_table(table.set_column(table.schema.get_field_index("video"), "video", cells), path)
    questions = msvd.BENCHMARK.from_tables(Tables(msvd.BENCHMARK.tables, tmp_path / "msvd"))
    with pytest.raises(ValueError, match=r"video bSrpvMSuhPM_17_31: row 2 has neither its bytes nor its path"):
        questions[2].visuals[0].open()
    tables = tables_of(tmp_path / "msrvtt", "msrvtt")
    (tmp_path / "msrvtt" / "videos" / "video6514.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no video .*/msrvtt/videos/video6514\.mp4"):
        msrvtt.BENCHMARK.from_tables(tables)[2].visuals[0].open()


def test_scoring_needs_only_the_annotations(tmp_path: Path):
    (tmp_path / "test_q.json").write_text('[{"video_name": "v", "question": "who?", "question_id": 7}]')
    (tmp_path / "test_a.json").write_text('[{"answer": "man", "type": 2, "question_id": 7}]')
    assert msvd.BENCHMARK.truth_from_folder(tmp_path) == {"7": Item(7, "v", "who?", "man", "2")}
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*videos"):
        msvd.BENCHMARK.from_folder(tmp_path)


def test_a_folder_that_lacks_annotations(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*test_q\.json"):
        read_items(tmp_path)


def asked(*rows: tuple[Any, str, str]) -> list[dict[str, Any]]:
    return [{"question_id": name, "video_name": video, "question": question} for name, video, question in rows]


def answered(*rows: tuple[Any, str]) -> list[dict[str, Any]]:
    return [{"question_id": name, "answer": answer, "type": 0} for name, answer in rows]


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        (asked((1, "a", "who?"), (2, "a", "what?")), answered((2, "cat"), (1, "man")), "in entry 0: 1 and 2"),
        (asked((1, "a", "who?")), answered((1, "man"), (2, "cat")), "have 1 and 2 entries"),
        (asked((1, "a", "who?"), (1, "a", "what?")), answered((1, "man"), (1, "cat")), "question_id 1 twice"),
        (asked((1, "a", "who?"), ("1", "a", "who?")), answered((1, "man"), ("1", "boy")), "question_id '1' twice"),
        (asked((1, "a", "who?"), (1, "b", "who?")), answered((1, "man"), (1, "man")), "question_id 1 twice"),
        (asked((1, "a", "who?")), [{"question_id": 1}], "entry 0 of .* has no 'answer'"),
        (asked((1, "a", "who?")), [{"answer": "man"}], "entry 0 of .* has no 'question_id'"),
        (asked((1, "a", "who?")), {"1": "man"}, r"test_a\.json is not a list of objects"),
    ],
)
def test_annotations_that_do_not_belong_together(tmp_path: Path, questions: Any, answers: Any, message: str):
    (tmp_path / "test_q.json").write_text(json.dumps(questions))
    (tmp_path / "test_a.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path)


def test_a_repeated_question_counts_once(tmp_path: Path):
    rows = (1, "a", "who?"), (2, "a", "what?"), (1, "a", "who?")
    (tmp_path / "test_q.json").write_text(json.dumps(asked(*rows)))
    (tmp_path / "test_a.json").write_text(json.dumps(answered((1, "man"), (2, "cat"), (1, "man"))))
    assert [item.id for item in read_items(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", ["tgif", "msvd", "msrvtt"])
def test_what_is_not_on_the_hub(tmp_path: Path, name: str):
    benchmark = BENCHMARKS[name]
    with pytest.raises(ValueError, match=f"{benchmark.title} is not on the hub: give a folder"):
        benchmark.from_tables(Tables(benchmark.tables))
    with pytest.raises(FileNotFoundError, match=r"no data/test-\*\.parquet with columns video_name, question"):
        benchmark.truth_from_tables(Tables(benchmark.tables, tmp_path))


def test_archives_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only for the questions, not for the truth; they need not be unpacked."""
    benchmark, fetched = activitynet.BENCHMARK, []
    local = tables_of(tmp_path, "activitynet")["test"]
    monkeypatch.setattr(Tables, "_load", lambda self, table: local)

    def fetch(dataset: str, **options: Any) -> str:
        fetched.append((dataset, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    tables = Tables(benchmark.tables)
    assert len(benchmark.truth_from_tables(tables)) == 4
    assert not fetched
    questions = benchmark.from_tables(tables)
    assert fetched == [("lmms-lab/ActivityNetQA", {"repo_type": "dataset", "allow_patterns": ["*.zip"]})]
    assert questions[0].visuals[0].key == f"{tmp_path}/videos_chunked_01.zip/all_test/v_1QIUV7WYKXg.mp4"
    assert len(questions[0].visuals[0].open()) == 8


def test_a_table_of_the_library_datasets(tmp_path: Path):
    """It marks the column as video, and would decode it by itself."""
    write_tables(tmp_path, "msvd")
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    features = {
        name: {"_type": "Video"} if name == "video" else {"dtype": str(table.schema.field(name).type), "_type": "Value"}
        for name in table.column_names
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    questions = msvd.BENCHMARK.from_tables(Tables(msvd.BENCHMARK.tables, tmp_path))
    assert len(questions[2].visuals[0].open()) == 8
    pq.write_table(pa.table({"question_id": [1], "question": ["who?"], "answer": ["man"]}), path)
    with pytest.raises(ValueError, match=r"row 0 of .*MSVD-QA.* has no 'video_name'"):
        msvd.BENCHMARK.truth_from_tables(Tables(msvd.BENCHMARK.tables, tmp_path))


# The judge

SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for "
    "question-answer pairs. Your task is to compare the predicted answer with the correct answer and determine if "
    "they match meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - Focus on the meaningful "
    "match between the predicted answer and the correct answer.\n- Consider synonyms or paraphrases as valid "
    "matches.\n- Evaluate the correctness of the prediction compared to the answer."
)
USER = (
    "Please evaluate the following video-based question-answer pair:\n\nQuestion: what is she doing \n"
    "Correct Answer: curling\nPredicted Answer: She is curling.\n\nProvide your evaluation only as a yes/no and score "
    "where the score is an integer value between 0 and 5, with 5 indicating the highest meaningful match. Please "
    "generate the response in the form of a Python dictionary string with keys 'pred' and 'score', where value of "
    "'pred' is  a string of 'yes' or 'no' and value of 'score' is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER "
    "OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. For example, your response should look "
    "like this: {'pred': 'yes', 'score': 4.8}."
)


def test_what_the_judge_reads():
    """benchmarks.md 5.3: verbatim, with the missing and the double space, and no temperature."""
    request = judge_request(Item("v_1_9", "1", "what is she doing ", "curling"), "She is curling.")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    assert [dict(message) for message in request.messages] == messages
    assert (request.temperature, request.max_tokens) == (None, None)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),  # int(4.8)
        ('{"pred": "No", "score": 1}', Verdict(False, 1)),
        ("{'pred': 'no', 'score': '2'}", Verdict(False, 2)),
        ("{'pred': 'no, but yes', 'score': 3}", Verdict(True, 3)),  # "yes" is looked for first
        ("{'pred': 'maybe', 'score': 3}", Verdict(None, 3)),
        ("{'pred': True, 'score': 5}", Verdict(None, 5)),
        ("{'score': 5}", Verdict(None, 5)),
        ("{'pred': 'yes'}", Verdict(None, 0)),  # the score is read first
        ("{'pred': 'yes', 'score': '4.8'}", Verdict(None, 0)),
        ("{'pred': 'yes', 'score': 1e999}", Verdict(None, 0)),
        ("['yes', 5]", Verdict(None, 0)),
        ("'yes'", Verdict(None, 0)),
        ("yes", None),
        ("", None),
        ("```python\n{'pred': 'yes', 'score': 5}\n```", None),
        ("{'pred': 'yes', 'score': 4", None),
        ('{"pred": "yes", "score": null}', None),  # json, not Python
        ("{'yes'}", None),  # a set is no json: the official tool would stop there
        ("[" * 10_000, None),
    ],
)
def test_what_the_judge_says(reply: str, verdict: Verdict | None):
    assert parse_verdict(reply) == verdict


# The score

TRUTH = {str(number): Item(number, f"v{number // 2}", "who?", "man", str(number % 2)) for number in range(8)}


def scored(answers: list[Answer], replies: dict[str, str]) -> Score:
    return msvd.BENCHMARK.score(answers, TRUTH, Scripted(replies))


def test_score_by_hand():
    """Of yes, yes, no, neither, no number and no verdict: accuracy 2/3, average (4 + 5 + 1 + 3 + 0) / 5."""
    replies = {
        "a": "{'pred': 'yes', 'score': 4.8}",
        "b": "{'pred': 'yes', 'score': 5}",
        "c": "{'pred': 'no', 'score': 1}",
        "d": "{'pred': 'unsure', 'score': 3}",
        "e": "{'pred': 'yes', 'score': 'five'}",
        "f": "I think so.",
    }
    result = scored([Answer(number, text) for number, text in enumerate("abcdef")], replies)
    assert result.metric == "accuracy (judged by gpt-3.5-turbo)"
    assert result.score == 100 * 2 / 3
    details = result.details
    assert details["average_score"] == 13 / 5
    assert (details["scored"], details["yes"], details["no"], details["neither"]) == (5, 2, 1, 2)
    assert (details["unjudged"], details["unjudged_ids"]) == (1, ["5"])
    assert (details["missing"], details["unreadable_videos"]) == (2, 0)
    assert details["types"] == {
        "0": {"accuracy": 50, "questions": 3},  # a, c, e
        "1": {"accuracy": 100, "questions": 2},  # b, d
    }
    assert result.points is None  # some answers are not in the mean
    json.dumps(details)


def test_missing_videos_are_wrong_and_reported():
    """Video-LLaVA's script leaves them out: then it would be 2 of 3."""
    yes, no = "{'pred': 'yes', 'score': 5}", "{'pred': 'no', 'score': 0}"
    missing = {"error": "there is no video v2.mp4"}
    answers = [Answer(0, "a"), Answer(1, "a"), Answer(2, "b"), *(Answer(n, "", "", missing) for n in (4, 5, 6))]
    judge = Scripted({"a": yes, "b": no})
    result = msvd.BENCHMARK.score(answers, TRUTH, judge)
    assert result.score == 100 * 2 / 6
    assert result.details["average_score"] == 10 / 6
    assert result.details["accuracy_without_unreadable_videos"] == 100 * 2 / 3
    assert result.details["unreadable_videos"] == 2
    assert result.details["unreadable_video_names"] == ["v2", "v3"]
    assert result.details["unreadable"] == 3
    assert result.points == [1, 1, 0, 0, 0, 0]
    assert len(judge.asked) == 3  # nobody pays for the others


def test_ids_may_be_text_or_numbers_and_the_last_answer_counts():
    answers = [Answer("0", "bad"), Answer("99", "?"), Answer(0, "good"), Answer("1", "bad")]
    judge = Scripted({"good": "{'pred': 'yes', 'score': 5}", "bad": "{'pred': 'no', 'score': 0}"})
    result = msvd.BENCHMARK.score(answers, TRUTH, judge)
    assert result.score == 50
    assert (result.details["unexpected"], result.details["repeated"]) == (1, 1)
    assert result.details["missing"] == 6
    assert len(judge.asked) == 2


def test_predictions_that_were_compared_with_other_questions_answers():
    """As in files that Video-LLaVA's script made on several GPUs; here the truth is that of the question."""
    answers = [Answer(0, "man", "who?", {"answer": "man"}), Answer(1, "man", "who?", {"answer": "cat"})]
    result = msvd.BENCHMARK.score(answers, TRUTH, exact_judge())
    assert result.score == 100
    assert result.details["answers_with_another_truth"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_proxy_without_a_judge(tmp_path: Path, name: str):
    benchmark, rows = BENCHMARKS[name], DATA[name].rows
    truth = benchmark.truth_from_folder(folder_of(tmp_path, name))
    texts = [f"It is {rows[0][3].upper()}.", "nothing of the kind", rows[2][3], ""]
    error = {"error": "there is no such video"}
    answers = [Answer(row[0], text, "", {} if text else error) for row, text in zip(rows, texts, strict=True)]
    result = benchmark.score(answers, truth, exact_judge())
    assert result.metric == "accuracy (exact match, an offline proxy for a judge)"
    assert result.score == expected(texts, name) == 50
    assert result.points == [1, 0, 1, 0]
    assert result.details["average_score"] is None
    assert result.details["unreadable_video_names"] == [rows[3][1]]


def test_types_of_activitynet_have_names(tmp_path: Path):
    truth = activitynet.BENCHMARK.truth_from_folder(folder_of(tmp_path, "activitynet"))
    answers = [Answer(row[0], row[3]) for row in DATA["activitynet"].rows[:3]]
    answers[1] = replace(answers[1], text="no idea")
    assert activitynet.BENCHMARK.score(answers, truth, exact_judge()).parts == {"motion": 100, "yes/no": 50}


def test_nothing_to_score():
    with pytest.raises(ValueError, match="none of the 1 answers"):
        scored([Answer(99, "man")], {})
    with pytest.raises(ValueError, match="of 8 questions 1 have an answer, and 0 of those a verdict"):
        scored([Answer(1, "man")], {"man": "Sorry."})
    with pytest.raises(ValueError, match="need a judge: give --judge"):
        msvd.BENCHMARK.score([Answer(1, "man")], TRUTH, None)


def test_a_graded_file(tmp_path: Path):
    """Of the official tool; its malformed entries count for the average only: (4 + 0 + 2 + 0) / 4."""
    pair = {"q": "who?", "a": "man", "pred": "a man"}
    entries = {
        "1": [{"pred": "yes", "score": 4.8}, pair],
        "2": [{"pred": "no", "score": 0}, pair],
        "3": [{"pred": "yes and no", "score": 2}, pair],
        "4": [{"prediction": "yes"}, pair],
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    result = graded(path)
    assert result.score == 100 * 2 / 3
    assert result.details == {"scored": 4, "yes": 2, "no": 1, "neither": 1, "average_score": 6 / 4}
    assert tgif.BENCHMARK.graded is graded
    path.write_text(json.dumps({"1": entries["4"]}))
    with pytest.raises(ValueError, match="no verdict that says yes or no"):
        graded(path)
    path.write_text(json.dumps(entries["1"]))
    with pytest.raises(ValueError, match="is not a graded file"):
        graded(path)


def test_protocol():
    """benchmarks.md 5.1 and 5.2."""
    folders = {
        "tgif": ("TGIF_Zero_Shot_QA", "mp4/"),
        "msvd": ("MSVD_Zero_Shot_QA", "videos/"),
        "msrvtt": ("MSRVTT_Zero_Shot_QA", "videos/all/"),
        "activitynet": ("Activitynet_Zero_Shot_QA", "all_test/"),
    }
    for name, benchmark in BENCHMARKS.items():
        folder, videos = folders[name]
        assert benchmark.folder == f"GPT_Zero_Shot_QA/{folder}"
        assert [file.path for file in benchmark.files] == ["test_q.json", "test_a.json", videos]
        assert [file.needed for file in benchmark.files] == ["both", "both", "run"]
        assert (benchmark.conv_mode, benchmark.max_new_tokens, benchmark.judged) == ("llava_v1", 1024, True)
    assert verdict_of({"pred": "YES", "score": 5}) == Verdict(True, 5)

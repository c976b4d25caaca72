"""Answers about videos: the judge's messages and replies, and the score by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_video import DATA, expected, write_folder
from judge_server import JudgeServer

from eval.benchmarks import activitynet, msrvtt, msvd, tgif
from eval.records import Answer, Score
from eval.scoring.judge import api_judge, exact_judge
from eval.scoring.replies import Request
from eval.scoring.video_judge import Item, Verdict, graded, judge_request, parse_verdict

BENCHMARKS = {each.BENCHMARK.name: each.BENCHMARK for each in (tgif, msvd, msrvtt, activitynet)}


class Scripted:
    """A judge that replies what it is told for each prediction, and keeps what it was asked."""

    model = "gpt-3.5-turbo"
    exact = False

    def __init__(self, replies: dict[str, str]) -> None:
        self.replies = replies
        self.asked: list[Request] = []

    def ask(self, requests: list[Request], parse: Callable[[str], Any], retry: None, clear: Any) -> list[Any]:
        self.asked += requests
        predictions = [each.messages[1]["content"].split("Predicted Answer: ")[1].split("\n\n")[0] for each in requests]
        return [parse(self.replies[prediction]) for prediction in predictions]


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
        ("{'pred': 'YES', 'score': 5}", Verdict(True, 5)),
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
    """Of yes, yes, no, neither, no number and no verdict: accuracy 2/3 of what says yes or no, average 13 / 5."""
    replies = {
        "a": "{'pred': 'yes', 'score': 4.8}",
        "b": "{'pred': 'yes', 'score': 5}",
        "c": "{'pred': 'no', 'score': 1}",
        "d": "{'pred': 'unsure', 'score': 3}",
        "e": "{'pred': 'yes', 'score': 'five'}",
        "f": "I think so.",
    }
    result = scored([Answer(number, text) for number, text in enumerate("abcdef")], replies)
    mark = "no readable reply of the judge about 3 of 6 answers, which are left out, as in Video-LLaVA's script"
    assert result.metric == f"accuracy (judged by gpt-3.5-turbo); INCOMPLETE: {mark}"
    assert result.score == 100 * 2 / 3
    details = result.details
    assert details["average_score"] == 13 / 5
    assert (details["scored"], details["yes"], details["no"], details["neither"]) == (5, 2, 1, 2)
    assert (details["unjudged"], details["unjudged_ids"]) == (3, ["3", "4", "5"])
    assert (details["missing"], details["unreadable_videos"]) == (2, 0)
    assert details["types"] == {
        "0": {"accuracy": 50, "questions": 3},  # a, c, e
        "1": {"accuracy": 100, "questions": 2},  # b, d
    }
    assert result.points is None  # some answers are not in the mean
    json.dumps(details)


def test_a_judge_that_says_neither_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its dictionary is well formed, but no verdict; a whole score has the official metric and no mark."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    replies = ['{"error": "busy"}', "{'pred': 'maybe', 'score': 3}", "```\n{'pred': 'yes', 'score': 5}\n```"]
    with JudgeServer(lambda body, number: [*replies, "{'pred': 'no', 'score': 1}"][number]) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        judge = api_judge("gpt-3.5-turbo", tmp_path / "judged")
        for _ in range(2):
            result = msvd.BENCHMARK.score([Answer(0, "a")], TRUTH, judge)
            assert (result.score, result.details["unjudged"], len(server.asked)) == (0, 0, 4)
            assert result.metric == "accuracy (judged by gpt-3.5-turbo)"


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


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_proxy_without_a_judge(tmp_path: Path, name: str):
    benchmark, rows = BENCHMARKS[name], DATA[name].rows
    truth = benchmark.truth_from_folder(write_folder(tmp_path, name))
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
    truth = activitynet.BENCHMARK.truth_from_folder(write_folder(tmp_path, "activitynet"))
    answers = [Answer(row[0], row[3]) for row in DATA["activitynet"].rows[:3]]
    answers[1] = replace(answers[1], text="no idea")
    assert activitynet.BENCHMARK.score(answers, truth, exact_judge()).parts == {"motion": 100, "yes/no": 50}


def test_nothing_to_score():
    with pytest.raises(ValueError, match="none of the 1 answers"):
        scored([Answer(99, "man")], {})
    lost = Answer(2, "", "", {"error": "there is no video v1.mp4"})  # it would be all that is scored
    for reply in ("Sorry.", "{'pred': 'maybe', 'score': 3}", '{"error": "busy"}'):
        with pytest.raises(
            ValueError, match="of 8 questions 2 have an answer, and none of those a verdict of the judge"
        ):
            scored([Answer(1, "man"), lost], {"man": reply})
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
    assert result.details == {"scored": 4, "yes": 2, "no": 1, "neither": 1, "unjudged": 1, "average_score": 6 / 4}
    assert "accuracy (graded); INCOMPLETE: no readable reply of the judge about 1 of 4" in result.metric
    assert tgif.BENCHMARK.graded is graded
    path.write_text(json.dumps({"1": entries["4"]}))
    with pytest.raises(ValueError, match="no verdict that says yes or no"):
        graded(path)
    path.write_text(json.dumps(entries["1"]))
    with pytest.raises(ValueError, match="is not a graded file"):
        graded(path)

"""The judge: what it sends, what it pays for, and replies that cannot be read."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import ask_of, completion, word_of

from eval.scoring.judge import Judge, api_judge, exact_judge
from eval.scoring.proxy import normalized_match
from eval.scoring.replies import Request

ROOT = Path(__file__).resolve().parents[2]
HELLO = Request(({"role": "user", "content": "hello"},))
pytestmark = pytest.mark.usefixtures("hurried")


# What is asked, and what is kept


def test_replies_come_in_the_requests_order(serve, tmp_path: Path):
    """Concurrently, not more than so many at a time, with the settings that are given and no others."""
    words = [str(number) for number in range(20)]

    def reply(body: dict[str, Any], number: int) -> str:
        time.sleep(0.002 * (7 * number % 5))
        return f"<{word_of(body)}>"

    server = serve(reply)
    judge = api_judge("gpt-4-0613", tmp_path / "cache", workers=4)
    assert (judge.model, judge.exact) == ("gpt-4-0613", False)
    assert judge.ask(ask_of(*words), str) == [f"<{word}>" for word in words]
    assert 2 <= server.most <= 4
    assert server.authorization == {"Bearer sk-test"}
    assert server.asked[0].keys() == {"model", "messages"} and server.asked[0]["model"] == "gpt-4-0613"

    judge.ask([replace(HELLO, temperature=0.0, max_tokens=3)], str)
    assert server.asked[-1] == {
        "model": "gpt-4-0613",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "max_tokens": 3,
    }


def test_nothing_is_paid_for_twice(serve, tmp_path: Path, capsys):
    """Neither in another process nor within a call; another model or setting is another request."""
    server = serve(lambda body, number: f"reply {number}")
    cache = tmp_path / "cache"
    first = api_judge("gpt-4-0613", cache, workers=1).ask(ask_of("a", "b", "a"), str)
    assert first == ["reply 0", "reply 1", "reply 0"] and len(server.asked) == 2
    capsys.readouterr()
    assert api_judge("gpt-4-0613", cache).ask(ask_of("b", "a", "c"), str) == ["reply 1", "reply 0", "reply 2"]
    assert "judge gpt-4-0613" in (bar := capsys.readouterr().err) and "cached=2" in bar and "3/3" in bar
    assert api_judge("gpt-4o", cache).ask(ask_of("a"), str) == ["reply 3"]
    assert api_judge("gpt-4o", cache).ask([replace(ask_of("a")[0], temperature=0.5)], str) == ["reply 4"]

    files = sorted(cache.iterdir())
    assert len(files) == 5 and all(len(file.stem) == 64 and file.suffix == ".json" for file in files)
    kept = [json.loads(file.read_text()) for file in files]
    assert {"request", "reply", "model"} == kept[0].keys()
    assert sorted(entry["reply"] for entry in kept) == [f"reply {number}" for number in range(5)]


def test_what_is_cached_needs_no_server(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serve(lambda body, number: "yes")
    api_judge("gpt-4-0613", tmp_path).ask(ask_of("a"), str)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert api_judge("gpt-4-0613", tmp_path).ask(ask_of("a"), str) == ["yes"]


@pytest.mark.parametrize("content", [b"", b'{"reply": "ye', b"[]", b'{"reply": 3}', b"\xff"])
def test_a_damaged_file_of_the_cache_is_asked_again(serve, tmp_path: Path, content: bytes):
    server = serve(lambda body, number: f"reply {number}")
    judge = api_judge("gpt-4-0613", tmp_path)
    judge.ask(ask_of("a"), str)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert judge.ask(ask_of("a"), str) == judge.ask(ask_of("a"), str) == ["reply 1"]
    assert len(server.asked) == 2


def test_a_killed_run_goes_on(serve, tmp_path: Path):
    """With kill -9 in the middle: what had come is not asked again, and the rest is."""
    killed = threading.Event()

    def reply(body: dict[str, Any], number: int) -> str:
        if number >= 3:
            killed.wait(20)
        return word_of(body).upper()

    server = serve(reply)
    code = (
        "import sys; from pathlib import Path; from eval.scoring.judge import Request, api_judge\n"
        "requests = [Request(({'role': 'user', 'content': word},)) for word in 'abcdef']\n"
        "print(api_judge('gpt-4-0613', Path(sys.argv[1]), workers=1).ask(requests, str))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(server.asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    killed.set()
    assert process.returncode == -signal.SIGKILL
    assert [word_of(body) for body in server.asked] == [*"abcd"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str([*"ABCDEF"]) and "cached=3" in done.stderr
    assert [word_of(body) for body in server.asked[4:]] == [*"def"]


# Replies that do not parse


def number_in(reply: str) -> int | None:
    return int(reply) if reply.isdecimal() else None


def test_what_does_not_parse_is_asked_again(serve, tmp_path: Path):
    """As ``retry`` changes the first request; only what did not parse; at last None, and the next time again."""
    server = serve(lambda body, number: "7" if word_of(body) in ("good", "late!!") else "hm")

    def retry(request: Request, attempt: int) -> Request:
        (message,) = request.messages
        longer = {**message, "content": message["content"] + "!" * attempt}
        return Request((longer,), temperature=0.5 * attempt)

    judge = api_judge("gpt-4-0613", tmp_path, workers=1, attempts=4)
    bad = [("bad", None), ("bad!", 0.5), ("bad!!", 1.0), ("bad!!!", 1.5)]
    assert judge.ask(ask_of("good", "late", "bad"), number_in, retry) == [7, 7, None]
    asked = [(word_of(body), body.get("temperature")) for body in server.asked]
    assert asked == [("good", None), ("late", None), ("late!", 0.5), ("late!!", 1.0), *bad]
    assert judge.ask(ask_of("good", "late", "bad"), number_in, retry) == [7, 7, None]
    assert [(word_of(body), body.get("temperature")) for body in server.asked[len(asked) :]] == bad
    assert len([file for file in tmp_path.iterdir() if file.is_file()]) == 2  # what cannot be read is not among them
    looked_at = [json.loads(file.read_text()) for file in (tmp_path / "unreadable").iterdir()]
    assert len(looked_at) == 6 and {entry["reply"] for entry in looked_at} == {"hm"}


def test_the_same_request_can_be_tried_again(serve, tmp_path: Path):
    """Without ``retry``: an attempt's reply is not the reply of the one before."""
    server = serve(lambda body, number: "hm" if number < 2 else "5")
    judge = api_judge("gpt-3.5-turbo", tmp_path)
    assert judge.ask([HELLO], number_in) == [5] and len(server.asked) == 3
    assert judge.ask([HELLO], number_in) == [5] and len(server.asked) == 3


def test_a_refusal_is_an_empty_reply(serve, tmp_path: Path):
    """The API gives null for the content then; it has been paid for, and counts as a reply that does not parse."""
    server = serve(lambda body, number: "1" if word_of(body) == "a" else (200, {}, completion(None)))
    assert api_judge("gpt-4-0613", tmp_path, attempts=2).ask(ask_of("a", "b"), number_in) == [1, None]
    assert len(server.asked) == 3


def test_no_reply_can_be_read(serve, tmp_path: Path):
    """The error names the last reply's file, and the same call asks a judge that has recovered."""
    server = serve(lambda body, number: "busy" if number < 6 else "1")
    judge = api_judge("gpt-4-0613", tmp_path, attempts=3)
    with pytest.raises(
        ValueError, match=r"none of the replies .* \(2 answers .* 3 times; .*'busy', see .*name a --judge"
    ) as raised:
        judge.ask(ask_of("a", "b"), number_in)
    (named,) = [file for file in (tmp_path / "unreadable").iterdir() if str(file) in str(raised.value)]
    assert json.loads(named.read_text())["reply"] == "busy" and "\n" not in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["unreadable"] and len(server.asked) == 6
    assert judge.ask(ask_of("a", "b"), number_in) == [1, 1] and len(server.asked) == 8


def test_a_judge_that_never_says_what_is_asked_is_not_paid_for_all(serve, tmp_path: Path):
    server = serve(lambda body, number: "As a language model, I")
    with pytest.raises(ValueError, match="none of the replies"):
        api_judge("gpt-4-0613", tmp_path, workers=4, attempts=2).ask(ask_of(*map(str, range(1000))), number_in)
    assert len(server.asked) < 2 * 30


def test_results_that_are_not_clear_are_asked_again(serve, tmp_path: Path):
    """The last one counts where there is none better; it is not kept as an answer."""
    server = serve(lambda body, number: "0" if word_of(body) == "never" or number < 2 else "7")
    judge = api_judge("gpt-4-0613", tmp_path, workers=1, attempts=3)
    for times in (1, 2):
        assert judge.ask(ask_of("late", "never"), number_in, None, bool) == [7, 0]
        assert len(server.asked) == 3 + 3 * times


def test_a_cache_of_unreadable_replies_heals(serve, tmp_path: Path):
    """Earlier versions kept every reply, of each attempt; one that can be read is not paid for again."""
    server = serve(lambda body, number: word_of(body))
    judge = api_judge("gpt-4-0613", tmp_path, workers=1)
    assert judge.ask(ask_of("1", "2"), lambda reply: None if number_in(reply) is None else reply) == ["1", "2"]
    for file in tmp_path.iterdir():
        content = json.loads(file.read_text())
        content["reply"] = "busy"
        file.write_text(json.dumps(content))
        if word_of(content["request"]) == "2":  # its second attempt can be read
            content["request"]["attempt"], content["reply"] = 1, "3"
            name = hashlib.sha256(json.dumps(content["request"], sort_keys=True).encode()).hexdigest()
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert judge.ask(ask_of("1", "2"), number_in) == [1, 3]
    assert [word_of(body) for body in server.asked[2:]] == ["1"]


def test_nothing_to_judge(tmp_path: Path):
    assert api_judge("gpt-4-0613", tmp_path).ask([], str) == []


# Before anything is asked


def test_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for value in (None, " "):
        monkeypatch.delenv("OPENAI_API_KEY") if value is None else monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(ValueError, match="gpt-4-0613 needs a key: set OPENAI_API_KEY"):
            api_judge("gpt-4-0613", tmp_path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "llava-visionzip\[eval\]"'):
        api_judge("gpt-4-0613", tmp_path)


# The proxy


def test_the_proxy_asks_nobody(tmp_path: Path):
    judge = exact_judge()
    assert isinstance(judge, Judge) and (judge.model, judge.exact) == ("exact", True)
    with pytest.raises(ValueError, match="no language model"):
        judge.ask([HELLO], str)
    with pytest.raises(ValueError, match="offline proxy"):
        api_judge("exact", tmp_path)


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("Dog", "dog", True),
        ("The dog.", "a dog", True),
        ("A man is playing the guitar on stage.", "guitar", True),
        ("playing guitar", "play", False),
        ("two men", "man", False),
        ("hot dog", "dog hot", False),
        ("It is a hot, small dog", "hot dog", False),
        ("x = -1 or x = -5", "-5", True),
        ("x = 5", "-5", False),
        ("It costs $1,000.50!", "1000.50", True),
        ("13.5", "3.5", False),
        ("10-5", "5", True),
        ("the man's hat", "mans hat", True),
        ("T-shirt", "t shirt", True),
        ("on the left side of the table", "left side of table", True),
        ("", "dog", False),
        ("dog", "", False),
        ("A", "a", True),
        ("?", "!", False),
    ],
)
def test_normalized_match(prediction: str, answer: str, same: bool):
    assert normalized_match(prediction, answer) is same


words = st.lists(st.sampled_from(["dog", "red", "two", "3.5", "-5", "jump", "blue"]), min_size=1, max_size=4)


@given(words, words, words)
def test_a_run_of_words_is_found_wherever_it_is(before: list[str], answer: list[str], after: list[str]):
    text = f"The {' '.join(before)}, {' the '.join(answer).upper()}; {' '.join(after)}!"
    assert normalized_match(text, " ".join(answer))
    assert normalized_match(" ".join(answer), text) is False

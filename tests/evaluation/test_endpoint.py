"""The line to a judge's endpoint: faults that pass, and servers that are down, silent or refuse."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import Reply, ask_of, failure, word_of

from eval.scoring.judge import api_judge
from eval.scoring.replies import Request

HELLO = Request(({"role": "user", "content": "hello"},))
pytestmark = pytest.mark.usefixtures("hurried")


@pytest.mark.parametrize(
    "bad",
    [
        failure(429, "slow down"),
        failure(429, "slow down", Retry_After="0.01"),
        failure(429, "slow down", retry_after_ms="10"),
        failure(500, "oh no"),
        (502, {"Content-Type": "text/html"}, b"<html>Bad gateway</html>"),
        failure(503, "overloaded"),
        (200, {}, b"{ this is no json"),
        (200, {"Content-Type": "text/html"}, b"<html>captive portal</html>"),
        (200, {}, b"\xff\xfe\x00"),
        (200, {}, b""),
        (200, {}, b"null"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": null}'),
        (200, {}, b'{"choices": [{"message": {"content": ["parts"]}}]}'),
        (200, {}, b'{"error": {"message": "overloaded", "code": 502}}'),
    ],
    ids=lambda bad: f"{bad[0]} {[*bad[1].values()]} {bad[2][:20]}",
)
def test_faults_that_pass_are_waited_for(serve, tmp_path: Path, bad: Reply):
    """Every request gets such an answer twice; none of these is kept."""
    seen: dict[str, int] = {}

    def reply(body: dict[str, Any], number: int) -> Reply:
        seen[word_of(body)] = seen.get(word_of(body), 0) + 1
        return bad if seen[word_of(body)] <= 2 else word_of(body).upper()

    server = serve(reply)
    assert api_judge("gpt-4-0613", tmp_path, workers=3).ask(ask_of("a", "b", "c"), str) == ["A", "B", "C"]
    assert len(server.asked) == 9 and len(list(tmp_path.iterdir())) == 3


def test_retry_after_is_obeyed(serve, tmp_path: Path):
    times = []

    def reply(body: dict[str, Any], number: int) -> Reply:
        times.append(time.monotonic())
        return "yes" if number else failure(429, "slow down", retry_after_ms="300")

    serve(reply)
    assert api_judge("gpt-4-0613", tmp_path).ask([HELLO], str) == ["yes"]
    assert times[1] - times[0] >= 0.29


def test_a_slow_server_is_asked_again(serve, tmp_path: Path):
    done = threading.Event()

    def reply(body: dict[str, Any], number: int) -> str:
        if number == 0:
            done.wait(5)
        return "yes"

    server = serve(reply)
    assert api_judge("gpt-4-0613", tmp_path, timeout=0.2).ask([HELLO], str) == ["yes"]
    done.set()
    assert len(server.asked) == 2


def test_a_server_that_stays_silent(serve, tmp_path: Path):
    done = threading.Event()
    serve(lambda body, number: str(done.wait(5)))
    with pytest.raises(OSError, match=r"1 of 1 replies of the judge gpt-4-0613 are missing.*timed out"):
        api_judge("gpt-4-0613", tmp_path, timeout=0.05).ask([HELLO], str)
    done.set()


def test_nothing_is_lost_when_the_server_goes_down(serve, tmp_path: Path):
    """What came is kept, the message says what is missing, and the same call goes on with that."""
    broken = {"c", "e"}
    server = serve(lambda body, number: failure(500, "out of memory") if word_of(body) in broken else word_of(body))
    judge = api_judge("gpt-4-0613", tmp_path, workers=4)
    with pytest.raises(OSError, match=r"2 of 5 .* HTTP 500: .*out of memory.*the same command goes on") as raised:
        judge.ask(ask_of(*"abcde"), str)
    assert str(tmp_path) in str(raised.value) and server.url in str(raised.value)
    asked = len(server.asked)
    assert asked == 3 + 2 * 4  # once, and three times again
    broken.clear()
    assert judge.ask(ask_of(*"abcde"), str) == [*"abcde"]
    assert sorted(word_of(body) for body in server.asked[asked:]) == ["c", "e"]


def test_a_server_that_is_down_for_all_is_not_asked_for_all(serve, tmp_path: Path):
    """Each request waits as long as the retries take: a few tell enough."""
    server = serve(lambda body, number: failure(503, "maintenance"))
    with pytest.raises(OSError, match=r"200 of 200 .*maintenance"):
        api_judge("gpt-4-0613", tmp_path, workers=2).ask(ask_of(*map(str, range(200))), str)
    assert len({word_of(body) for body in server.asked}) < 20


def test_a_silent_server_is_given_up_for_all(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every try waits for its timeout, but all of them together not longer than the patience; what came stays."""
    monkeypatch.setattr("eval.scoring.endpoint._RETRIES", 50)
    done = threading.Event()
    server = serve(lambda body, number: "yes" if number < 3 else str(done.wait(20)))
    judge = api_judge("gpt-4-0613", tmp_path, workers=3, timeout=0.4, patience=1.0)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"197 of 200 .*timed out.*the same command goes on.*OPENAI_BASE_URL"):
        judge.ask(ask_of(*map(str, range(200))), str)
    assert 0.9 < time.monotonic() - began < 6
    assert len({word_of(body) for body in server.asked}) < 12 and len(list(tmp_path.iterdir())) == 3
    done.set()


def test_a_server_that_wants_to_be_left_alone_is_not_waited_for_for_ever(serve, tmp_path: Path):
    serve(lambda body, number: failure(429, "slow down", Retry_After="30"))
    began = time.monotonic()
    with pytest.raises(OSError, match=r"2 of 2 .*HTTP 429: .*slow down"):
        api_judge("gpt-4-0613", tmp_path, patience=0.5).ask(ask_of("a", "b"), str)
    assert time.monotonic() - began < 6


def test_one_question_that_is_never_answered_does_not_hold_up_the_others(serve, tmp_path: Path):
    """While others are answered the endpoint is alive; the one has its own patience."""
    done = threading.Event()

    def reply(body: dict[str, Any], number: int) -> str:
        if word_of(body) == "a":
            return str(done.wait(20))
        time.sleep(0.05)
        return "yes"

    serve(reply)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"1 of 30 .*timed out"):
        api_judge("gpt-4-0613", tmp_path, workers=2, timeout=5, patience=0.8).ask(
            ask_of("a", *map(str, range(29))), str
        )
    assert time.monotonic() - began < 6 and len(list(tmp_path.iterdir())) == 29
    done.set()


def test_garbage_without_end(serve, tmp_path: Path):
    server = serve(lambda body, number: (200, {}, b"<html>login</html>"))
    with pytest.raises(OSError, match=r"no chat completion \('<html>login</html>'\)"):
        api_judge("gpt-4-0613", tmp_path).ask([HELLO], str)
    assert len(server.asked) == 4 and not list(tmp_path.iterdir())


def test_a_port_where_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    with pytest.raises(OSError, match=rf"2 of 2 .*127\.0\.0\.1:{port}/v1/ cannot be reached .*refused"):
        api_judge("gpt-4-0613", tmp_path).ask(ask_of("a", "b"), str)


@pytest.mark.parametrize(
    ("status", "cure"),
    [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "--judge.*OPENAI_BASE_URL"), (400, "--judge")],
)
def test_what_retrying_cannot_cure_is_said_at_once(serve, tmp_path: Path, status: int, cure: str):
    """Without asking for the rest, and without losing what came before."""
    server = serve(lambda body, number: word_of(body) if number < 3 else failure(status, "no way"))
    judge = api_judge("gpt-4-0613", tmp_path, workers=1)
    with pytest.raises(ValueError, match=rf"{server.url}.*HTTP {status}: .*no way.*{cure}") as raised:
        judge.ask(ask_of(*map(str, range(100))), str)
    assert "\n" not in str(raised.value) and "sk-test" not in str(raised.value)
    assert len(server.asked) < 10 and len(list(tmp_path.iterdir())) == 3

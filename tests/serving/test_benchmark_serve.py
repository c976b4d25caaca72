"""``visionzip benchmark serve``: two endpoints under the same load, in turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_server import ChatServer

from llava.cli import main
from llava.measure.client import Endpoint
from llava.measure.serve import make_picture, percentile


def bench(*flags: object) -> int:
    return main(["benchmark", "serve", *map(str, flags)])


def test_two_endpoints_get_the_same_load_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same pictures for both, none twice unless they are shared, as many at a time as there are clients.

    The use of the KV cache is that of the endpoint that says it, and no error of the other one.
    """
    with ChatServer(0.1, 587, has_metrics=True) as slow, ChatServer(0.02, 75) as fast:
        flags = ("--clients", 3, "--seconds", 1, "--rounds", 1, "--max-new-tokens", 7, "--image-size", 32)
        files = ("--output", tmp_path / "out.json", "--plot", tmp_path / "out.svg", "--extra", '{"ignore_eos": true}')
        assert bench("--endpoints", f"vanilla={slow.url}", f"zipped={fast.url}", *flags, *files) == 0
    said = capsys.readouterr().out
    assert "vanilla" in said and "requests/s" in said and "25.0%" in said
    assert (tmp_path / "out.svg").stat().st_size > 1000
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["images"], row["clients"], row["way"]) for row in rows] == [
        (kind, 3, way) for kind in ("distinct", "shared") for way in ("vanilla", "zipped")
    ]
    for vanilla, zipped in zip(rows[::2], rows[1::2], strict=True):
        assert (vanilla["prompt_tokens"], zipped["prompt_tokens"]) == (587, 75)
        assert vanilla["rate_ratio"]["median"] == 1 < zipped["rate_ratio"]["median"]
        assert vanilla["first_p99"] >= vanilla["first_p50"] > 0.1 > zipped["first_p50"] > 0.02
        assert zipped["tokens_per_second"] == pytest.approx(3 * zipped["requests_per_second"])
        assert vanilla["requests_per_second"] < vanilla["clients"] / 0.1
        assert 0.1 <= vanilla["kv_peak"] <= 0.3 and vanilla["prefix_hits"] == 0.25
        assert zipped["kv_peak"] is None and zipped["prefix_hits"] is None
    assert (slow.most, fast.most) == (3, 3)
    counted = [body for body in slow.asked if "ignore_eos" in body]
    assert len(counted) == sum(row["requests"] for row in rows[::2]) == len(slow.asked) - 2  # one before each cell
    assert all(body["max_tokens"] == 7 and body["stream"] and body["temperature"] == 0 for body in slow.asked)
    pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in counted]
    distinct = sum(row["requests"] for row in rows[:2:2])
    assert len(set(pictures[:distinct])) == distinct and len(set(pictures[distinct:])) == 1
    assert pictures[0] in [body["messages"][0]["content"][0]["image_url"]["url"] for body in fast.asked]


def test_pictures_follow_from_the_seed():
    assert make_picture((0, 1), 32) == make_picture((0, 1), 32) != make_picture((1, 1), 32)


def test_percentiles():
    assert [percentile([3, 1, 2, 4], percent) for percent in (50, 75, 99)] == [2, 3, 4]
    assert percentile([5.0], 99) == 5.0


def test_an_answer_is_streamed():
    with ChatServer(0, 75) as server:
        reply = Endpoint(server.url).ask("What is it?", [], 5, {})
    assert (reply.text, reply.prompt_tokens, reply.new_tokens) == ("one two three", 75, 3)
    assert 0 < reply.first <= reply.seconds


def test_errors_name_the_cure(capsys: pytest.CaptureFixture[str]):
    with ChatServer(0, 75) as server:
        for flags, said in (
            (("--endpoints", server.url), "give NAME=URL"),
            (("--endpoints", "a=127.0.0.1:8000"), "is no address of a server: give one such as"),
            (("--endpoints", f"a={server.url}", "--model", "other"), "serves no model 'other': it has tiny"),
            (("--endpoints", f"a={server.url}", f"a={server.url}"), "two have the same name"),
            (("--endpoints", f"a={server.url}/x"), "answers 404"),
            (("--endpoints", f"a={server.url}", "--extra", "[1]"), 'give an object, such as {"ignore_eos": true}'),
            (("--endpoints", "a=http://127.0.0.1:1/v1"), "start the server first"),
        ):
            assert bench(*flags) == 2
            assert said in capsys.readouterr().err

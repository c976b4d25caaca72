"""Every benchmark through its own script, on a few questions in the real format, both ways; scores as by hand."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from judge_server import JudgeServer, Reply, failure
from sentencepiece import SentencePieceProcessor

from checkpoints import CLIP, TOKENIZER, edit_weights
from eval.__main__ import main as eval_command
from eval.launch import arguments, processes
from eval.registry import BENCHMARKS
from eval.running.answer_files import read_answers

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "scripts" / "eval"
VIDEO = ("tgif", "msvd", "msrvtt", "activitynet")
NAMED = {"mmbench_cn": "mmbench", **dict.fromkeys(VIDEO, "video")}  # whose data another module makes, by name
SERVER = ("vqav2", "vizwiz")  # LLaVA's folder has what only a server can score
NAMES = sorted(set(BENCHMARKS) - {"scenes"})
# What the model may say, so that some of its answers are right.
WORDS = {
    "activitynet": ("yes", "no"),
    "gqa": ("no", "woman"),
    "llavabench": ("red", "blue"),
    "mme": ("yes", "no"),
    "mmvet": ("green", "lime"),
    "msrvtt": ("music", "guy"),
    "msvd": ("man", "lady"),
    "pope": ("no", "yes"),
    "seed": ("B", "C", "D", "A"),
    "textvqa": ("malt", "10"),
    "tgif": ("two", "black"),
    "vizwiz": ("unanswerable", "red"),
    "vqav2": ("2", "yes"),
    **dict.fromkeys(("mmbench", "mmbench_cn", "mmmu", "sqa"), ("A", "B", "C", "D")),
}

Weights = dict[str, torch.Tensor]


def speaking(weights: Weights, words: tuple[str, ...]) -> Weights:
    """The weights of a model that answers one of some words, by what it sees, and then ends.

    Each token of a word has a dimension of its own, which nothing else writes to, and which makes the next one certain.
    """
    tokenizer, (end, blank) = SentencePieceProcessor(str(TOKENIZER)), (2, "▁")
    spelled = [[token for token in tokenizer.encode(word) if tokenizer.id_to_piece(token) != blank] for word in words]
    follows = {token: after for word in spelled for token, after in zip(word, [*word[1:], end], strict=True)}
    assert all(follows[a] == b for word in spelled for a, b in pairwise(word)), "ambiguous words"
    own = len(follows)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "mm_projector.2.weight", "mm_projector.2.bias")):
            weight[:own] = 0
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embeddings[:, :own] = 0
    head[:] = 0
    for dimension, (token, after) in enumerate(follows.items()):
        embeddings[token, dimension] = 1000
        head[after, dimension] = 1
    starts = torch.randn(len(words), head.shape[1] - own, generator=torch.Generator().manual_seed(0))
    for word, start in zip(spelled, starts - starts.mean(dim=0), strict=True):  # one of them is always above 0
        head[word[0], own:] += start
    return weights


@pytest.fixture
def model_for(make_checkpoint, make_video_checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """The model of a benchmark: 8 x 8 patches, its words; a LLaVA-1.5 or a Video-LLaVA."""

    def make(name: str, video: bool = False) -> Path:
        source = (make_video_checkpoint if video else make_checkpoint)(vision={**CLIP, "image_size": 112})
        folder = shutil.copytree(source, tmp_path / ("Video-LLaVA-tiny" if video else "llava-v1.5-tiny"))
        edit_weights(folder, lambda weights: speaking(weights, WORDS[name]))
        return folder

    return make


def bash(script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a script of ``scripts/eval`` with settings in its environment and none from ours."""
    unset = (
        "MODEL_PATH",
        "METHOD",
        "DOMINANT",
        "CONTEXTUAL",
        "DATA_ROOT",
        "FROM_HUB",
        "OUTPUT",
        "CUDA_VISIBLE_DEVICES",
    )
    inherited = {key: value for key, value in os.environ.items() if key not in (*unset, "PROCESSES")}
    command = ["bash", str(SCRIPTS / f"{script}.sh"), *flags]
    return subprocess.run(
        command, env={**inherited, **settings}, capture_output=True, text=True, timeout=200, check=False
    )


def data_module(name: str) -> tuple[ModuleType, tuple[str, ...]]:
    """The module that makes a benchmark's data, and what its functions want besides."""
    return importlib.import_module(f"data_{NAMED.get(name, name)}"), (name,) if name in NAMED else ()


def judge(name: str) -> list[str]:
    return ["--judge", "exact"] if BENCHMARKS[name].judged and BENCHMARKS[name].proxy else []


def check(name: str, out: Path, where: list[str], *, folder: bool) -> None:
    """The score is that of the texts in the answers file by the data module's own reckoning, as ``score`` finds too."""
    module, more = data_module(name)
    results = json.loads((out / "results.json").read_text())
    file = out / "answers" / "visionzip-6.jsonl"
    texts = [answer.text for answer in read_answers(file)[0]]
    assert len(texts) == results["questions"] and not results["not_asked"]["visionzip-6"]
    assert set(texts) <= set(WORDS[name])
    (row,) = results["rows"]
    assert 0 < row["visual_tokens"] <= 6 * 8
    scored = ["score", name, "--answers", str(file), "--output", str(out / "score.json"), *where, *judge(name)]
    if folder and name in SERVER:
        (submission,) = (out / "submissions" / "visionzip-6").iterdir()
        assert json.loads(submission.read_text()) == module.expected_submission(texts)
    if name == "llavabench" or (folder and name in SERVER):  # without a judge, without the truth
        assert "score" not in row
        assert eval_command(scored) == 2
        return
    assert row["score"] == pytest.approx(module.expected(texts, *more), abs=1e-9)
    assert row["score"] > 0 or name.startswith("mmbench")  # that wants the right letter in all rotations
    assert eval_command(scored) == 0
    again = json.loads((out / "score.json").read_text())
    assert again["score"] == row["score"] and again["details"].items() >= row["details"].items()


@pytest.mark.parametrize("name", NAMES)
def test_script(name: str, model_for, quick_python: Path, tmp_path: Path):
    """``bash scripts/eval/NAME.sh`` on LLaVA's folder; Video-LLaVA answers about videos, each of which is one to it."""
    module, more = data_module(name)
    module.write_folder(tmp_path / "data", *more)
    settings = {
        "VIRTUAL_ENV": str(quick_python),
        "MODEL_PATH": str(model_for(name, video=name in VIDEO)),
        "DOMINANT": "5",
        "CONTEXTUAL": "1",
        "DATA_ROOT": str(tmp_path / "data"),
        "OUTPUT": str(tmp_path / "out"),
    }
    done = bash(name, "--device", "cpu", "--batch-size", "2", *judge(name), **settings)
    assert done.returncode == 0, done.stderr
    check(name, tmp_path / "out", ["--data-root", str(tmp_path / "data")], folder=True)
    assert "visionzip 5+1" in done.stdout
    if name in VIDEO:
        (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
        assert row["visual_tokens"] == 6 * 8


@pytest.mark.parametrize("name", [name for name in NAMES if BENCHMARKS[name].tables])
def test_tables(name: str, model_for, tmp_path: Path):
    """The Hugging Face data set, as a local copy of its parquet files; the frames of a video are images to a LLaVA."""
    module, more = data_module(name)
    module.write_tables(tmp_path / "tables", *more)
    where = ["--from-hub", str(tmp_path / "tables")]
    places = ["--model-path", str(model_for(name)), *where, "--output", str(tmp_path / "out"), "--device", "cpu"]
    asked = ["--method", "visionzip", "--tokens", "6", "--batch-size", "2", *judge(name)]
    assert eval_command(["run", name, *places, *asked]) == 0
    check(name, tmp_path / "out", where, folder=False)


def test_answers_that_the_judge_has_not_judged(model_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A score of them is marked on the screen, in the table and in the json; a dead judge loses nothing."""
    module, _ = data_module("llavabench")
    module.write_folder(tmp_path)
    dead = True

    def reply(body: dict[str, Any], number: int) -> Reply:
        return failure(400, "no such thing") if dead and number >= 2 else module.review(body)

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    out, flags = tmp_path / "out", ["--judge", "gpt-4-0314", "--judge-attempts", "2"]
    command = ["--model-path", str(model_for("llavabench")), "--output", str(out), "--device", "cpu", *flags]
    with JudgeServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        run = ["run", "llavabench", *command, "--data-root", str(tmp_path), "--method", "vanilla"]
        assert eval_command(run) == 2
        assert f"Replies that came are kept in {out / 'judged'}: the same command" in capsys.readouterr().err
        dead, kept = False, len(list((out / "judged").glob("*.json")))
        asked = len(server.asked)
        assert eval_command(run) == 0
        assert len(server.asked) - asked == (3 - kept) + 2  # and twice the one that cannot be read
    mark = "INCOMPLETE: no readable reply of the judge about 1 of 4 answers, which count as rated -1 and -1"
    printed = " ".join(capsys.readouterr().out.split())
    assert mark in printed and " † " in printed
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert (row["unjudged"], row["details"]["unjudged"]) == (1, 1) and mark in row["metric"]
    assert f"{row['score']:.1f} † |" in (table := (out / "table.md").read_text()) and mark in table
    remark = f"- results.json, vanilla: {row['metric']}."
    assert eval_command(["table", "--paper", "1", str(out)]) == 0 and remark in capsys.readouterr().out

    with JudgeServer(lambda body, number: "9 3" if "blue?" in body["messages"][-1]["content"] else "") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        where = ["--answers", str(out / "answers" / "vanilla.jsonl"), "--output", str(out / "score.json")]
        score = ["score", "llavabench", *where, "--data-root", str(tmp_path), *flags]
        assert eval_command(score) == 0 and len(server.asked) == 1  # only that one, of a judge who is well now
    assert "INCOMPLETE" not in capsys.readouterr().out


def test_a_limited_run_submits_nothing(model_for, tmp_path: Path):
    """A server wants all answers; those that there are stay."""
    module, _ = data_module("vizwiz")
    module.write_folder(tmp_path)
    places = ["--model-path", str(model_for("vizwiz")), "--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    assert eval_command(["run", "vizwiz", *places, "--device", "cpu", "--method", "vanilla", "--limit", "1"]) == 0
    assert (tmp_path / "out" / "answers" / "vanilla.jsonl").exists() and not (tmp_path / "out" / "submissions").exists()


def test_a_limited_run_is_partial(model_for, tmp_path: Path, capsys):
    """Scored over the two that were asked, with a standard error, and the table says so."""
    module, _ = data_module("gqa")
    module.write_folder(tmp_path)
    out = tmp_path / "out"
    places = ["--model-path", str(model_for("gqa")), "--data-root", str(tmp_path), "--output", str(out)]
    assert eval_command(["run", "gqa", *places, "--device", "cpu", "--method", "vanilla", "--limit", "2"]) == 0
    results = json.loads((out / "results.json").read_text())
    (row,) = results["rows"]
    texts = [answer.text for answer in read_answers(out / "answers" / "vanilla.jsonl")[0]]
    right = sum(text == gold for text, gold in zip(texts, ("no", "woman"), strict=True))
    assert row["score"] == 50 * right and row["standard_error"] is not None
    assert (results["questions"], results["of_questions"], results["incomplete"]) == (2, 5, {})
    table = (out / "table.md").read_text()
    assert "| overall (partial) |" in table and f"| {row['score']:.1f} ± " in table
    assert "Partial: 2 of 5 questions, scored over these; exact match" in " ".join(capsys.readouterr().out.split())


def test_scripts_are_short_and_there_is_one_for_each():
    scripts = {file.stem: file.read_text().splitlines() for file in SCRIPTS.iterdir()}
    assert set(scripts) == {*NAMES, "all", "run"}
    assert all(len(lines) <= 10 for lines in scripts.values())


def test_all(quick_python: Path, tmp_path: Path):
    """Each is tried, and those that fail are named at the end."""
    module, _ = data_module("gqa")
    module.write_folder(tmp_path / "data")
    settings = {"VIRTUAL_ENV": str(quick_python), "DATA_ROOT": str(tmp_path / "data"), "MODEL_PATH": str(tmp_path)}
    done = bash("all", NAMES="mme gqa", **settings)
    assert done.returncode == 1 and "failed: mme gqa" in done.stderr
    assert done.stderr.count("has no config.json") == 2


def test_settings():
    """What the environment's variables come to, by the line they should be."""
    model = "--model-path liuhaotian/llava-v1.5-7b"
    out = "results/pope/llava-v1.5-7b"
    both = {"DOMINANT": "54", "CONTEXTUAL": "10"}
    for settings, line in (
        ({}, f"{model} --method vanilla --output {out}/vanilla"),
        (both, f"{model} --method visionzip --output {out}/visionzip-54+10 --dominant 54 --contextual 10"),
        (
            {**both, "METHOD": "vanilla visionzip", "MODEL_PATH": "my/llava/"},
            "--model-path my/llava/ --method vanilla visionzip --output results/pope/llava/vanilla-visionzip-54+10 "
            "--dominant 54 --contextual 10",
        ),
        ({"CONTEXTUAL": "10"}, f"{model} --method visionzip --output {out}/visionzip-10 --contextual 10"),  # refused
        ({"METHOD": "", "FROM_HUB": "1"}, f"{model} --method vanilla --output {out}/vanilla --from-hub"),
        ({"OUTPUT": "o", "FROM_HUB": "d"}, f"{model} --method vanilla --output o --from-hub d"),
        ({"OUTPUT": "o", "DATA_ROOT": "d"}, f"{model} --method vanilla --output o --data-root d"),
    ):
        assert arguments("pope", ["--limit", "8"], settings) == ["run", "pope", *line.split(), "--limit", "8"]
    assert arguments("tgif", [], {})[3] == "LanguageBind/Video-LLaVA-7B"
    for settings, number in (({}, 1), ({"CUDA_VISIBLE_DEVICES": "0,3"}, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 1)):
        assert processes(settings) == number
    assert processes({"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "1"}) == 1
    with pytest.raises(ValueError, match="PROCESSES=two"):
        processes({"PROCESSES": "two"})

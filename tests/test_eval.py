"""``python -m eval``: scores, resumption, what it refuses, and the quickstart, on a tiny random model and test set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from checkpoints import CLIP, NEXT, edit_weights
from eval.__main__ import main as eval_command
from eval.answers import Given, open_part, read_answers
from eval.benchmark import Answer, Table
from eval.benchmarks import scenes
from eval.data import copy_of
from eval.methods import METHODS, Run, attach, attached, plan, split
from eval.registry import BENCHMARKS
from eval.results import bootstrap, summarize
from eval.runner import fingerprint
from eval.sources import Tables
from playground.scenes import make_test_set, write_parquet
from visionzip import visionzip

ROOT = Path(__file__).resolve().parents[1]
# An average over both layers is more than half of the tokens, and SparseVLM's is published for 32 layers.
IN_TWO_LAYERS = [method for method in METHODS if not method.endswith("-average")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a test set of 280 questions."""
    folder = tmp_path_factory.mktemp("scenes")
    write_parquet(list(make_test_set(seed=5, per_type=40)), folder / "test.parquet")
    return folder


@pytest.fixture
def run(make_checkpoint: Callable[..., Path], data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short run on the tiny model (4 x 4 patches), into ``out``."""

    def arguments(*more: str, model: Path | None = None, limit: int = 24) -> list[str]:
        model = model or make_checkpoint()
        places = ["--model-path", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
        return ["run", "scenes", *places, "--device", "cpu", "--batch-size", "8", "--limit", str(limit), *more]

    return arguments


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_list(capsys):
    assert eval_command(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*BENCHMARKS, *METHODS))


def test_run_and_table(run, data: Path, tmp_path: Path, capsys):
    """Every method at two budgets: counted tokens, scores that the answers give, a table of them, and a quick rerun."""
    methods = IN_TWO_LAYERS
    command = run("--method", *methods, "--tokens", "6", "4", "--seeds", "2")
    assert eval_command(command) == 0
    out = tmp_path / "out"
    results, printed = results_of(out), capsys.readouterr().out
    assert len(results["rows"]) == 1 + 2 * (len(methods) - 1)
    assert {row["visual_tokens"] for row in results["rows"]} == {16, 6, 4}
    assert all(row["tokens"] in (None, row["visual_tokens"]) for row in results["rows"])
    assert [row["method"] for row in results["rows"][:3]] == ["vanilla", "visionzip", "dominant-only"]
    assert {row["method"]: row["seeds"] for row in results["rows"]} == {m: [0, 1] * (m == "random") for m in methods}
    assert (results["batch_size"], results["processes"], results["model_base"]) == (8, 1, None)
    assert results["questions"] == 24 and "USER: <image>\n" in results["setting"]["first_prompt"]

    truth = scenes.truth(data)
    for row in results["rows"]:
        runs = plan([row["method"]], [row["tokens"]] if row["tokens"] else [], 2)
        found = []
        for name in (each.name for each in runs):
            answers, notes = read_answers(out / "answers" / f"{name}.jsonl")
            assert [answer.question_id for answer in answers] == list(truth)[:24]
            assert notes == {"model": results["model"], "run": name}
            found += [scenes.is_right(answer.text, truth[answer.question_id][1]) for answer in answers]
        assert row["score"] == pytest.approx(100 * np.mean(found))
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert {entry["minus"] for entry in results["differences"]} == set(methods) - {"vanilla", "visionzip"}

    table = (out / "table.md").read_text()
    assert "| visionzip 5+1 | 6 |" in table and "| visionzip 3+1 | 4 |" in table and "| no-cls 3+1 | 4 |" in table
    assert "random: mean of 2 seeds" in table and "visionzip 5+1" in printed
    assert not list(out.rglob("*.partial"))

    (out / "table.md").unlink()
    assert eval_command(["table", str(out)]) == 0
    assert (out / "table.md").read_text() == table


def test_a_finished_run_is_not_done_again(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = run("--method", "vanilla", "uniform", "--tokens", "4", limit=8)
    assert eval_command(command) == 0
    before = results_of(tmp_path / "out")
    monkeypatch.setattr("eval.runner.load_from_arguments", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    assert eval_command(command) == 0
    after = results_of(tmp_path / "out")
    assert after["rows"] == before["rows"] and after["cost"] == before["cost"]


@pytest.mark.parametrize("lost", ["a torn line", "a whole answer", "all but a torn header"])
def test_a_killed_run_goes_on(run, tmp_path: Path, lost: str):
    """Every question is answered once, in the order and with the words of a run that was not killed."""
    command = run("--method", "vanilla", "random", "--tokens", "4", "--seeds", "1")
    assert eval_command(command) == 0
    file = tmp_path / "out" / "answers" / "parts" / "random-4-seed0.0.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {
        "a torn line": b"".join(lines[:6]) + lines[6][:9],
        "a whole answer": b"".join(lines[:-1]),
        "all but a torn header": lines[0][:20],
    }[lost]
    file.write_bytes(kept)
    merged = tmp_path / "out" / "answers" / "random-4-seed0.jsonl"
    before = merged.read_bytes()
    assert eval_command(command) == 0
    assert merged.read_bytes() == before
    resumed, whole = (untimed(content) for content in (file.read_bytes(), whole))
    if lost == "all but a torn header":  # written anew, with its date
        resumed, whole = resumed[1:], whole[1:]
    assert resumed == whole


def untimed(part: bytes) -> list[dict[str, Any]]:
    """A part's lines, without the seconds that answers took."""
    return [{**json.loads(line), "seconds": None} for line in part.splitlines()]


def test_kill(run, tmp_path: Path):
    """SIGKILL in the middle, then the same command."""
    arguments = run("--method", "vanilla", "pool", "--tokens", "4", limit=96)
    command, answers = [sys.executable, "-m", "eval", *arguments], tmp_path / "out" / "answers"
    file = answers / "parts" / "vanilla.0.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not file.exists() or file.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    ids = [json.loads(line)["question_id"] for line in (answers / "vanilla.jsonl").read_text().splitlines()]
    assert ids == list(range(96))
    assert len(results_of(tmp_path / "out")["rows"]) == 2


def test_answers_of_another_setting_are_not_mixed(run, copied, data: Path, tmp_path: Path, capsys):
    folder = copied()
    command = run("--method", "vanilla", model=folder, limit=8)
    assert eval_command(command) == 0
    answers = tmp_path / "out" / "answers" / "parts" / "vanilla.0.jsonl"
    before = answers.read_bytes()
    other_data = tmp_path / "other.parquet"  # the file itself will do, too
    write_parquet(list(make_test_set(seed=6, per_type=40)), other_data)
    for more, changed in (
        (["--conv-mode", "llava_v1"], r"first_prompt was .*curious user.*, is .*curious human"),
        (["--data", str(other_data)], "data was"),
    ):
        assert eval_command([*command, *more]) == 2
        assert_matches(capsys.readouterr().err, changed)
    edit_weights(folder, lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    assert eval_command(command) == 2
    assert_matches(
        capsys.readouterr().err, r"vanilla.0.jsonl has answers of another setting.*\(model was.*choose another"
    )
    assert answers.read_bytes() == before


def assert_matches(text: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


@pytest.mark.parametrize("size", [9, 70 << 20])
def test_another_checkpoint_at_the_same_path_is_noticed(size: int, tmp_path: Path):
    """Of a large file samples are read: each tensor of 4 MiB has one in it."""
    weights = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)

    def written(name: str, changed: slice = slice(0)) -> str:
        own = weights.copy()
        own[changed] += 1
        (tmp_path / name).mkdir(exist_ok=True)
        own.tofile(tmp_path / name / "model.safetensors")
        return fingerprint(str(tmp_path / name))

    one = written("one")
    assert written("copy") == written("one") == one
    tensor = min(4 << 20, size // 3)
    for start in (0, size // 3, size // 2, size - tensor):
        assert written("one", slice(start, start + tensor)) != one


def test_a_larger_limit_adds_to_the_answers(run, tmp_path: Path):
    assert eval_command(run("--method", "vanilla", limit=8)) == 0
    assert eval_command(run("--method", "vanilla", limit=20)) == 0
    answers = tmp_path / "out" / "answers" / "vanilla.jsonl"
    assert len(answers.read_text().splitlines()) == 20
    assert eval_command(run("--method", "vanilla", limit=8)) == 0
    results = results_of(tmp_path / "out")
    assert (results["questions"], results["limited"]) == (8, True)
    assert "8 questions, not all there are;" in (tmp_path / "out" / "table.md").read_text()
    assert len(answers.read_text().splitlines()) == 8


def test_batches_do_not_matter(run, tmp_path: Path):
    """Eight at a time give the answers of one at a time; questions about one image share its encoding."""
    texts = []
    for size in ("8", "1"):
        out = tmp_path / f"out{size}"
        command = run("--method", "random", "visionzip", "--tokens", "6", "--batch-size", size, "--output", str(out))
        assert eval_command(command) == 0
        names = ("random-6-seed0", "visionzip-6")
        texts.append([(out / "answers" / f"{name}.jsonl").read_text() for name in names])
    assert texts[0] == texts[1]


def test_two_processes_give_the_answers_of_one(run, tmp_path: Path):
    """Started by torchrun, which deals the batches out; each question is answered once, and the files are the same."""
    command = run("--method", "visionzip", "--tokens", "6", limit=40)
    assert eval_command(command) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eval"]
    shared = tmp_path / "shared"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *command, "--output", str(shared)], cwd=ROOT, env=environment, check=True, timeout=300)
    one, two = (folder / "answers" / "visionzip-6.jsonl" for folder in (tmp_path / "out", shared))
    assert two.read_bytes() == one.read_bytes()
    parts = [file.read_text().splitlines() for file in sorted((shared / "answers" / "parts").iterdir())]
    assert [len(part) - 1 for part in parts] == [24, 16]  # five batches of eight
    first, second = sorted((shared / "answers" / "parts").iterdir())  # killed, and gone on with by one process
    first.write_bytes(b"".join(first.read_bytes().splitlines(keepends=True)[:12]))
    second.write_bytes(second.read_bytes()[:-9])
    two.unlink()
    assert eval_command([*command, "--output", str(shared)]) == 0
    assert two.read_bytes() == one.read_bytes()
    assert results_of(shared)["rows"][0]["score"] == results_of(tmp_path / "out")["rows"][0]["score"]


def test_a_budget_of_ones_own(run, copied, tmp_path: Path, capsys):
    """``--dominant`` and ``--contextual``, and the budget that a checkpoint was saved with."""
    command = run("--method", "visionzip", "--dominant", "5", "--contextual", "3", limit=4)
    assert eval_command(command) == 0
    (row,) = results_of(tmp_path / "out")["rows"]
    assert (row["dominant"], row["contextual"], row["visual_tokens"]) == (5, 3, 8)
    assert (tmp_path / "out" / "answers" / "visionzip-8-5+3.jsonl").exists()
    for more, message in (
        (["--dominant", "5"], "give both"),
        (["--method", "vanilla", "--dominant", "5", "--contextual", "3"], "--method vanilla keeps all visual tokens"),
    ):
        assert eval_command(run(*more)) == 2
        assert message in capsys.readouterr().err
    folder = copied()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "visionzip": {"dominant": 3, "contextual": 2}}))
    out = tmp_path / "tuned"
    assert eval_command(run("--method", "visionzip", "--output", str(out), model=folder, limit=4)) == 0
    assert (results_of(out)["rows"][0]["visual_tokens"], results_of(out)["tuned"]) == (5, True)


def test_images_that_cannot_be_read(run, data: Path, tmp_path: Path, capsys):
    """An error that keeps what is answered; with ``--skip-bad`` questions that are counted, and wrong."""
    table = pq.read_table(data / "test.parquet").slice(0, 24).to_pylist()
    broken = table[10]["image_id"]
    for row in table:
        if row["image_id"] == broken:
            row["image"]["bytes"] = row["image"]["bytes"][:100]
    folder = tmp_path / "broken"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(table), folder / "test.parquet")
    command = run("--method", "vanilla", "--data", str(folder), "--batch-size", "1")
    assert eval_command(command) == 2
    assert f"image {broken} of" in (message := capsys.readouterr().err) and "--skip-bad" in message
    assert eval_command([*command, "--skip-bad"]) == 0
    affected = sum(row["image_id"] == broken for row in table)
    assert f"vanilla: {affected} questions could not be asked" in capsys.readouterr().err
    assert len(results_of(tmp_path / "out")["not_asked"]["vanilla"]) == affected
    answers, _ = read_answers(tmp_path / "out" / "answers" / "vanilla.jsonl")
    assert sum("error" in answer.extra and not answer.text for answer in answers) == affected
    pq.write_table(pq.read_table(data / "test.parquet").slice(0, 24), folder / "test.parquet")  # it is repaired
    assert eval_command([*command, "--skip-bad"]) == 0
    assert len(results_of(tmp_path / "out")["not_asked"]["vanilla"]) == affected
    assert eval_command(command) == 0
    assert results_of(tmp_path / "out")["not_asked"]["vanilla"] == []
    repaired = (tmp_path / "out" / "answers" / "vanilla.jsonl").read_bytes()
    assert eval_command(run("--method", "vanilla", "--output", str(tmp_path / "whole"))) == 0
    assert (tmp_path / "whole" / "answers" / "vanilla.jsonl").read_bytes() == repaired


def test_score_of_an_answers_file(data: Path, tmp_path: Path, capsys):
    """As any tool writes it; a last line that is half written is counted."""
    right = scenes.truth(data)
    lines = [
        json.dumps({"question_id": name, "prompt": "?", "text": right[name][1] if name % 4 else "no idea"})
        for name in range(8)
    ]
    file, out = tmp_path / "answers.jsonl", tmp_path / "result.json"
    command = ["score", "scenes", "--answers", str(file), "--data", str(data), "--output", str(out)]
    file.write_text("\n".join([*lines, '{"question_id": 8, "te']))
    assert eval_command(command) == 0
    result = json.loads(out.read_text())
    assert (result["benchmark"], result["metric"], result["score"]) == ("scenes", "exact match, %", 75)
    assert (result["details"]["answered"], result["details"]["half_written_lines"]) == (8, 1)
    two_runs = [{"question_id": n, "text": "", "metadata": {"run": f"visionzip-{n}"}} for n in (4, 6)]
    for content, message in (
        ("{}\n{", "line 2 of"),
        (json.dumps({"question_id": 1}), "line 1 of .* has no 'text'"),
        ("\n".join(map(json.dumps, two_runs)), "answers of several runs"),
        ("[1]\n", "entry 1 of .* is int, not an object"),
        ("", "answers.jsonl has no answers"),
        ('{"question_id": 1, "text": null}', "line 1 of .* has no 'text'"),
        ('{"question_id": [1], "text": ""}', r"line 1 of .* has the question_id \[1\]"),
        ("\udcff", "answers.jsonl is no UTF-8 text"),
    ):
        file.write_bytes((content + "\n").encode(errors="surrogateescape"))
        assert eval_command(command) == 2
        assert_matches(capsys.readouterr().err, message)
    assert eval_command(["score", "scenes", "--answers", "nowhere.jsonl", "--output", str(out)]) == 2
    assert "no answers file nowhere.jsonl" in capsys.readouterr().err


def test_answers_in_other_formats(tmp_path: Path):
    """A list of objects, metadata of any kind, Windows' line ends and mark, Video-LLaVA's lines, MMMU's object."""
    file = tmp_path / "answers"
    lines = [
        json.dumps({"question_id": n, "prompt": "?", "text": "é", "metadata": m}) for n, m in ((1, "x"), ("2", {}))
    ]
    answers = [Answer(1, "é", "?"), Answer("2", "é", "?")]
    for content in ("\ufeff" + "\r\n".join([*lines, ""]), f"[{','.join(lines)}]", "\n".join(lines)):
        file.write_text(content, encoding="utf-8", newline="")
        assert read_answers(file) == (answers, {})
    file.write_text(json.dumps({"id": "v_1_0", "question": "is it", "answer": "yes", "pred": "Yes, it is"}) + "\n")
    assert read_answers(file)[0] == [Answer("v_1_0", "Yes, it is", "is it", {"question": "is it", "answer": "yes"})]
    file.write_text(json.dumps({"validation_Art_1": "A", "validation_Art_2": "(B)"}, indent=1))
    assert read_answers(file)[0] == [Answer("validation_Art_1", "A"), Answer("validation_Art_2", "(B)")]
    for subject, letter in (("Art", "C"), ("Music", "D")):
        (tmp_path / "official" / subject).mkdir(parents=True)
        records = [{"id": f"validation_{subject}_1", "response": letter, "index2ans": {}}]
        (tmp_path / "official" / subject / "output.json").write_text(json.dumps(records))
    names = {answer.question_id: answer.text for answer in read_answers(tmp_path / "official")[0]}
    assert names == {"validation_Art_1": "C", "validation_Music_1": "D"}


def test_prepare(data: Path, tmp_path: Path, capsys):
    assert eval_command(["prepare", "scenes", "--data-root", str(data.parent / data.name / "nowhere")]) == 2
    printed = capsys.readouterr()
    assert "missing" in printed.out and "python -m playground.scenes test" in printed.out
    assert "not complete: scenes" in printed.err
    assert eval_command(["prepare", "scenes"]) == 0  # it is in the repository
    assert "1400" in capsys.readouterr().out
    assert eval_command(["prepare", "scenes", "--from-hub"]) == 2
    assert "scenes has no data set on the hub" in capsys.readouterr().err
    nothing = ["--from-hub", str(tmp_path)]  # each is looked at, but for those that are not on the hub
    assert eval_command(["prepare", "all", *nothing]) == 2
    report = capsys.readouterr().err
    assert "mme: " in report and "--repo-type dataset lmms-lab/POPE" in report and "scenes" not in report
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "test.parquet").write_bytes(b"PAR1")
    assert eval_command(["prepare", "mme", "pope", "--data-root", str(damaged)]) == 2
    assert "not complete: mme, pope" in capsys.readouterr().err


def test_tables_of_a_local_copy(tmp_path: Path):
    """A folder with copies of several data sets; one that is damaged or not whole is named."""
    table = Table("lmms-lab/MME", "test")
    one, other = ({"question_id": [n]} for n in ("a", "b"))
    for dataset, rows in (("MME", one), ("lmms-lab/POPE", other)):
        (tmp_path / dataset / "data").mkdir(parents=True)
        pq.write_table(pa.table(rows), tmp_path / dataset / "data" / "test-00000-of-00001.parquet")
    assert copy_of(BENCHMARKS["mme"], str(tmp_path)) == tmp_path / "MME"
    assert copy_of(BENCHMARKS["pope"], str(tmp_path)) == tmp_path / "lmms-lab" / "POPE"
    assert copy_of(BENCHMARKS["pope"], str(tmp_path / "MME")) == tmp_path / "MME"
    assert Tables({"test": table}, tmp_path / "MME")["test"].column("question_id") == ["a"]
    file = tmp_path / "MME" / "data" / "test-00000-of-00001.parquet"
    for content in (file.read_bytes()[:-9], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="lmms-lab/MME test cannot be read"):
            Tables({"test": table}, tmp_path / "MME")["test"]
    file.rename(file.with_name("test-00001-of-00003.parquet"))
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of 3 files .* test-00000-of-00003.parquet"):
        Tables({"test": table}, tmp_path / "MME")["test"]


def test_bad_input_is_explained_before_anything_is_loaded(run, unread, data: Path, tmp_path: Path, capsys):
    content, table = (data / "test.parquet").read_bytes(), pq.read_table(data / "test.parquet")
    folders = {name: tmp_path / name for name in ("damaged", "twice", "few")}
    for folder in folders.values():
        folder.mkdir()
    (folders["damaged"] / "test.parquet").write_bytes(content[:5000])
    pq.write_table(table.take([0, 1, 1]), folders["twice"] / "test.parquet")
    pq.write_table(table.drop_columns(["answer"]), folders["few"] / "test.parquet")
    for more, message in (
        (["--method", "pool"], "--method pool needs a budget: give --tokens"),
        (["--method", "vanilla", "--data", "nowhere"], "no file nowhere/test.parquet: make it with"),
        (["--method", "vanilla", "--data", str(folders["damaged"])], "test.parquet is not a readable parquet file"),
        (["--method", "vanilla", "--data", str(folders["twice"])], "has 1 ids more than once (1)"),
        (["--method", "vanilla", "--data", str(folders["few"])], "test.parquet has no column answer"),
        (["--method", "vanilla", "--model-path", "/nowhere"], "/nowhere has no config.json"),
    ):
        assert eval_command([*run(), *more]) == 2, more
        assert message in capsys.readouterr().err
    assert eval_command(["table", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err


def test_grids_of_tiles(run, make_checkpoint, tmp_path: Path, capsys):
    """LLaVA-NeXT: budgets are per tile, what is counted is what the language model gets; controls are refused."""
    command = run("--method", "vanilla", "visionzip", "--tokens", "6", model=make_checkpoint(**NEXT), limit=4)
    assert eval_command(command) == 0
    vanilla, zipped = results_of(tmp_path / "out")["rows"]
    assert vanilla["visual_tokens"] > 5 * 16  # newlines too
    assert (zipped["dominant"], zipped["contextual"], zipped["visual_tokens"]) == (5, 1, 5 * 6)
    assert eval_command([*command, "--method", "uniform"]) == 2
    assert "cuts images into grids of tiles" in capsys.readouterr().err


def test_answers_of_other_code_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    command = run("--method", "vanilla", limit=4)
    monkeypatch.setattr("eval.runner.git_commit", lambda: "c0ffee")
    assert eval_command(command) == 0
    monkeypatch.setattr("eval.runner.git_commit", lambda: "decade")
    assert eval_command(command) == 0
    assert "has answers of other code (commit c0ffee), which stay" in capsys.readouterr().err


def test_budgets_are_checked_before_the_first_answer(run, tmp_path: Path, capsys):
    for tokens, message in (("17", "an image has only 16 patches"), ("7", "tokens=7 cannot be pooled")):
        assert eval_command(run("--method", "vanilla", "pool", "--tokens", tokens)) == 2
        assert message in capsys.readouterr().err
    part = tmp_path / "out" / "answers" / "parts" / "vanilla.0.jsonl"
    assert len(part.read_text().splitlines()) == 1  # its header


def test_damaged_answers_are_not_overwritten(tmp_path: Path):
    path = tmp_path / "run.0.jsonl"
    with open_part(path, {"tokens": 4}, {}) as part:
        part.append([Given(1, "yes", 4), Given(2, "Übergröße", 4)])
        with pytest.raises(BlockingIOError, match="another process is writing"), open_part(path, {"tokens": 4}, {}):
            pass
        with open_part(tmp_path / "run.1.jsonl", {"tokens": 4}, {}) as other:  # of another process
            assert other.given == part.given
    with open_part(path, {"tokens": 4}, {}) as part:
        assert part.given[2].text == "Übergröße"
    lines = path.read_bytes().splitlines(keepends=True)
    for content, message in (
        ([lines[0], b"{\n", lines[1]], "line 2 of .* is damaged"),
        ([*lines, lines[1]], "answers question 1 twice"),
    ):
        path.write_bytes(b"".join(content))
        with pytest.raises(ValueError, match=message), open_part(path, {"tokens": 4}, {}):
            pass
        assert path.read_bytes() == b"".join(content)


def test_methods(load):
    _, model, _, _ = load(vision={**CLIP, "image_size": 112})  # 8 x 8 patches
    images = [torch.randn(3, 112, 112)]
    everything = model.visual_tokens(images)[0]
    for run in plan(IN_TWO_LAYERS, [32, 4], 2):
        with attached(model, run):
            expected = 64 if run.inside else run.tokens or 64
            assert len(model.visual_tokens(images)[0]) == expected, run.name
        assert torch.equal(model.visual_tokens(images)[0], everything)
    with attached(model, Run("visionzip", 32)):
        expected = model.visual_tokens(images)[0]
    torch.testing.assert_close(visionzip(model, 27, 5).visual_tokens(images)[0], expected)
    attach(model, Run("no-cls", 32))  # in the place of what is on it
    no_cls = model.visual_tokens(images)[0]
    attach(model, Run("dominant-only", 28))
    torch.testing.assert_close(model.visual_tokens(images)[0][1:], no_cls[:27])


def test_budgets_and_names():
    paper = {64: (54, 10), 128: (108, 20), 192: (162, 30), 32: (27, 5)}
    assert {tokens: split(tokens) for tokens in paper} == paper
    assert [split(tokens) for tokens in (48, 16, 1)] == [(40, 8), (13, 3), (1, 0)]
    runs = plan(["random", "vanilla", "pool", "pool"], [9, 4, 9], 2)
    names = ["vanilla", "random-9-seed0", "random-9-seed1", "pool-9", "random-4-seed0", "random-4-seed1", "pool-4"]
    assert [run.name for run in runs] == names
    assert plan(["visionzip"], [], 1, (54, 10)) == [Run("visionzip", 64)]  # the paper's own split
    (own,) = plan(["visionzip"], [], 1, (15, 2))
    assert (own.name, own.budget) == ("visionzip-17-15+2", (15, 2))


@pytest.mark.parametrize(
    ("text", "right"), [("red", True), (" Red. ", True), ("reddish", False), ("", False), ("red red", False)]
)
def test_exact_match(text: str, right: bool):
    assert scenes.is_right(text, "red") == right


def test_scores_by_hand(data: Path):
    """Of four questions vanilla has three, VisionZip two, random three with one seed and one with the other."""
    truth = scenes.truth(data)
    types = ("count", "color", "shape", "reading")
    names = [next(name for name, (type_, _) in truth.items() if type_ == wanted) for wanted in types]
    right = {
        Run("vanilla"): [1, 1, 1, 0],
        Run("visionzip", 4): [0, 1, 1, 0],
        Run("random", 4, 0): [0, 1, 1, 1],
        Run("random", 4, 1): [0, 1, 0, 0],
    }
    scores = {
        run: scenes.score([Answer(n, truth[n][1] if ok else "?") for n, ok in zip(names, row, strict=True)], truth)
        for run, row in right.items()
    }
    answers = {run: {place: Given(place, "", run.tokens or 144, (1, 2, 3)) for place in range(4)} for run in right}
    seconds = {"154": [0.3, 0.2, 0.4], "14": [0.1, 0.1, 0.1]}
    prefill = {
        length: {"seconds": times, "lengths": [int(length)] * 2, "flops": 10, "paper_flops": 4}
        for length, times in seconds.items()
    }
    cost = {"text_tokens": 10, "prefill": prefill, "vision_seconds": {}}
    summary = summarize(scores, answers, cost)
    vanilla, zipped, random = summary["rows"]
    assert [row["score"] for row in summary["rows"]] == [75, 50, 50]
    assert random["score_by_seed"] == {"0": 75, "1": 25}
    assert zipped["of_vanilla"] == pytest.approx(2 / 3)
    assert zipped["parts"] == {"color": 100, "shape": 100, "count": 0, "reading": 0}
    assert random["parts"]["reading"] == 50
    assert zipped["prefill_seconds"]["median"] == 0.1 and zipped["prefill_speed_up"]["median"] == pytest.approx(3)
    assert (vanilla["visual_tokens"], zipped["visual_tokens"], zipped["prompt_tokens"]) == (144, 4, 14)
    assert random["seconds"] == {"vision": 4, "prefill": 8, "decode": 12}
    # Of n scores the standard error of the mean is their standard deviation (with n below it) by the root of n.
    assert zipped["standard_error"] == pytest.approx(100 * np.std([0, 1, 1, 0]) / 2, rel=0.1)
    (difference,) = summary["differences"]
    assert (difference["minus"], difference["difference"]) == ("random", 0)
    assert difference["standard_error"] == pytest.approx(100 * np.std([0, 0, 0.5, -0.5]) / 2, rel=0.1)
    unscored = summarize({}, answers, cost)  # a server's
    assert unscored["differences"] == [] and "score" not in unscored["rows"][0]


def test_bootstrap_is_seeded_and_paired():
    rng = np.random.default_rng(1)
    points = rng.integers(0, 2, (400, 1)).astype(float)
    drawn = bootstrap(np.hstack([points, 1 - points]))
    np.testing.assert_array_equal(bootstrap(np.hstack([points, 1 - points])), drawn)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    assert drawn[:, 0].std() == pytest.approx(points.std() / 20, rel=0.1)


def test_quickstart(make_checkpoint, data: Path, tmp_path: Path):
    """The script, as users start it, on another model and few questions; pip is left out, the environment is there."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] || exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    model = make_checkpoint(vision={**CLIP, "image_size": 112})  # 8 x 8 patches
    out = tmp_path / "quickstart"
    places = {"VIRTUAL_ENV": str(tmp_path / "venv"), "MODEL_PATH": str(model), "OUTPUT": str(out)}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--limit", "4", "--seeds", "1", "--data", str(data)]
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "visionzip 40+8" in done.stdout and "pool" in done.stdout
    assert {row["visual_tokens"] for row in results_of(out)["rows"]} == {64, 48, 32, 16}
    assert {"table.md", "results.json", "tokens.png", "scene.jpg"} <= {file.name for file in out.iterdir()}

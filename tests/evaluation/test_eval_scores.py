"""``python -m eval score`` and ``prepare``, methods and budgets, and scores by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from checkpoints import CLIP
from eval.__main__ import main as eval_command
from eval.benchmarks import scenes
from eval.models.llava import LlavaModel
from eval.reading.tables import Tables
from eval.records import Answer, Score, Table
from eval.registry import BENCHMARKS
from eval.reports.results import bootstrap, summarize
from eval.reports.table import facts, main_table
from eval.running.answer_files import read_answers
from eval.running.answers import Given
from eval.running.data import copy_of
from eval.running.methods import METHODS, Run, attach, plan, split
from eval.scoring.judge import marked
from visionzip import visionzip

# An average over both layers is more than half of the tokens, and SparseVLM's is published for 32 layers.
IN_TWO_LAYERS = [name for name, own in METHODS.items() if not (name.endswith("-average") or own.of_picture)]


def test_score_of_an_answers_file(scenes_data: Path, tmp_path: Path, capsys):
    """As any tool writes it; a last line that is half written is counted."""
    right = scenes.truth(scenes_data)
    lines = [
        json.dumps({"question_id": name, "prompt": "?", "text": right[name][1] if name % 4 else "no idea"})
        for name in range(8)
    ]
    file, out = tmp_path / "answers.jsonl", tmp_path / "result.json"
    command = ["score", "scenes", "--answers", str(file), "--data", str(scenes_data), "--output", str(out)]
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
        assert re.search(message, capsys.readouterr().err)
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


def test_prepare(scenes_data: Path, tmp_path: Path, capsys):
    assert eval_command(["prepare", "scenes", "--data-root", str(scenes_data / "nowhere")]) == 2
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


def test_methods(load):
    tokenizer, model, image_processor, _ = load(vision={**CLIP, "image_size": 112})  # 8 x 8 patches
    asked = LlavaModel(model, tokenizer, image_processor, "vicuna_v1")
    images = [torch.randn(3, 112, 112)]
    everything = model.visual_tokens(images)[0]
    for run in plan(IN_TWO_LAYERS, [32, 4], 2):
        with asked.attached(run):
            expected = 64 if run.inside else run.tokens or 64
            assert len(model.visual_tokens(images)[0]) == expected, run.name
        assert torch.equal(model.visual_tokens(images)[0], everything)
    with asked.attached(Run("visionzip", 32)):
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


def test_scores_by_hand(scenes_data: Path):
    """Of four questions vanilla has three, VisionZip two, random three with one seed and one with the other."""
    truth = scenes.truth(scenes_data)
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


def test_rows_with_answers_that_are_not_judged():
    """Each has its mark, if only one of its seeds has such answers, and the sentence below says which rows have."""
    runs = {Run("vanilla"): 0, Run("random", 4, 0): 0, Run("random", 4, 1): 2}
    scores = {
        run: Score(marked("accuracy", unjudged, 9, "are left out"), 50, {"unjudged": unjudged})
        for run, unjudged in runs.items()
    }
    answers = {run: {0: Given(0, "", run.tokens or 144, (1, 2, 3))} for run in runs}
    timed = {"seconds": [0.1], "flops": 10, "paper_flops": 4}
    prefill = {length: {**timed, "lengths": [int(length)]} for length in ("154", "14")}
    cost = {"text_tokens": 10, "prefill": prefill, "vision_seconds": {}}
    results = {**summarize(scores, answers, cost), "cost": cost, "questions": 9, "limited": False, "conv_mode": "v1"}
    results["environment"] = dict.fromkeys(
        ("date", "device", "threads", "torch", "transformers", "git_commit"), "recorded"
    )
    assert [row["unjudged"] for row in results["rows"]] == [0, 2]
    _, vanilla, random = main_table(results)
    assert (vanilla[2], random[2]) == ("50.0", "50.0 †")
    said = "random 4: accuracy; INCOMPLETE: no readable reply of the judge about 2 of 9 answers, which are left out"
    assert f"vanilla: accuracy; † {said};" in facts(results)


def test_the_image_to_show_is_the_first_of_median_accuracy(scenes_data: Path):
    rows = pq.read_table(scenes_data).to_pylist()
    files = list(dict.fromkeys(row["image"]["bytes"] for row in rows))
    # The first image is answered wrongly, the second rightly, the third half, and so on: half is the median.
    wrong = {file: [0, 1, 2][place % 3] for place, file in enumerate(files[:9])}
    answers, seen = [], dict.fromkeys(files, 0)
    for row in rows:
        file = row["image"]["bytes"]
        if file in wrong:
            seen[file] += 1
            right = [False, True, seen[file] % 2 == 0][wrong[file]]
            answers.append(Answer(row["question_id"], row["answer"] if right else "?"))
    assert {seen[file] for file in wrong} == {4}, "as the halves take"
    assert scenes.median_image(scenes_data, answers) == files[2]
    assert scenes.median_image(scenes_data, [a for a in answers if a.question_id < 8]) == files[0]  # the lower of two
    with pytest.raises(ValueError, match="none of the 1 answers"):
        scenes.median_image(scenes_data, [Answer(10**6, "yes")])


def test_bootstrap_is_seeded_and_paired():
    rng = np.random.default_rng(1)
    points = rng.integers(0, 2, (400, 1)).astype(float)
    drawn = bootstrap(np.hstack([points, 1 - points]))
    np.testing.assert_array_equal(bootstrap(np.hstack([points, 1 - points])), drawn)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    assert drawn[:, 0].std() == pytest.approx(points.std() / 20, rel=0.1)

"""The lmms-eval model; needs lmms-eval, which has an environment of its own (docs/serving.md says how to make it)."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from pyarrow import parquet

from eval.running.answer_files import read_answers
from llava.cli import main

if not find_spec("lmms_eval"):
    pytest.skip("needs lmms-eval, in an environment of its own: docs/serving.md", allow_module_level=True)

from visionzip_eval.lmms import VisionZip, manifest

ROOT = Path(__file__).parents[2]
MODEL, DATA = ROOT / "checkpoints/llava-mini", ROOT / "playground/data/eval/scenes/test.parquet"
LIMIT = 40


def requests(**wanted: Any) -> tuple[list[Any], dict[str, Any]]:
    """What lmms-eval asks a model, and where it looks the documents up."""
    rows = parquet.read_table(DATA).to_pylist()[:LIMIT]
    settings = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"], **wanted}

    def visuals(row: dict[str, Any]) -> list[Image.Image]:
        return [Image.open(io.BytesIO(row["image"]["bytes"]))]

    asked = [(row["question"], settings, visuals, index, "scenes", "test") for index, row in enumerate(rows)]
    return [SimpleNamespace(args=args) for args in asked], {"scenes": {"test": rows}}


def test_answers_are_those_of_this_projects_harness(tmp_path: Path):
    """In batches, in the order of the requests."""
    model = VisionZip(str(MODEL), dominant=13, contextual=3, batch_size=16)
    asked, model.task_dict = requests()
    flags = ("--model-path", MODEL, "--method", "visionzip", "--tokens", 16, "--limit", LIMIT, "--output", tmp_path)
    assert main(["eval", "run", "scenes", *map(str, flags)]) == 0
    answers, _ = read_answers(next((tmp_path / "answers").glob("visionzip*.jsonl")))
    assert model.generate_until(asked) == [answer.text for answer in answers]


def test_what_it_does_not_do_is_said():
    model = VisionZip(str(MODEL), keep=0.25, method="uniform")
    asked, model.task_dict = requests(temperature=0.7)
    with pytest.raises(ValueError, match="answers are greedy here"):
        model.generate_until(asked)
    with pytest.raises(ValueError, match="choose one"):
        VisionZip(str(MODEL), vanilla=True, keep=16)
    with pytest.raises(NotImplementedError, match="generate_until only"):
        model.loglikelihood(asked)


def test_lmms_eval_finds_it():
    assert manifest().model_id == "visionzip"

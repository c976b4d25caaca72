"""Image benchmarks with a Mini-Gemini, through the same command as with LLaVA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mini_gemini import write_mini_gemini
from test_end_to_end import WORDS, data_module, speaking

from checkpoints import CLIP, edit_weights
from eval.__main__ import main as eval_command
from eval.answers import read_answers


@pytest.mark.parametrize("name", ["pope", "sqa"])  # ScienceQA has questions without an image too
def test_run(name: str, tmp_path: Path) -> None:
    folder = write_mini_gemini(tmp_path / "MGM-tiny", vision={**CLIP, "image_size": 112}, image_size_aux=256)
    edit_weights(folder, lambda weights: speaking(weights, WORDS[name]))
    module, more = data_module(name)
    module.write_folder(tmp_path / "data", *more)
    out = tmp_path / "out"
    places = ["--model-path", str(folder), "--data-root", str(tmp_path / "data"), "--output", str(out)]
    asked = ["--method", "vanilla", "visionzip", "--tokens", "6", "--batch-size", "2", "--device", "cpu"]
    assert eval_command(["run", name, *places, *asked]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["conv_mode"] == "vicuna_v1"
    vanilla, zipped = results["rows"]
    assert (vanilla["visual_tokens"], zipped["visual_tokens"]) == (64, 6)
    for row, file in ((vanilla, "vanilla"), (zipped, "visionzip-6")):
        texts = [answer.text for answer in read_answers(out / "answers" / f"{file}.jsonl")[0]]
        assert row["score"] == pytest.approx(module.expected(texts, *more), abs=1e-9)
        assert set(texts) <= set(WORDS[name])

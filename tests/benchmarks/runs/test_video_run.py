"""Benchmarks of videos with another number of frames, as in the paper's Figure 8: ``python -m eval run … --frames``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_pope import write_folder as write_images
from data_video import write_folder

from checkpoints import CLIP
from eval.__main__ import main
from eval.registry import BENCHMARKS
from eval.running.setting import template_for


@pytest.fixture
def run(make_video_checkpoint: Callable[..., Path], tmp_path: Path):
    """``python -m eval run`` with the tiny Video-LLaVA (8 x 8 patches, a context of 2048); its results' folder."""
    write_folder(tmp_path / "data", "msvd")
    write_images(tmp_path / "data")
    model = make_video_checkpoint(vision={**CLIP, "image_size": 112})
    out = tmp_path / "out"

    def go(name: str, *flags: str) -> int:
        places = ["--model-path", str(model), "--data-root", str(tmp_path / "data"), "--output", str(out)]
        return main(["run", name, *places, "--device", "cpu", "--judge", "exact", "--limit", "3", *flags])

    return out, go


def test_more_frames(run, capsys):
    """They are in the results; and answers about other numbers are not mixed with these."""
    out, go = run
    budget = ["--method", "visionzip", "--dominant", "5", "--contextual", "1"]
    assert go("msvd", *budget, "--frames", "20") == 0
    results = json.loads((out / "results.json").read_text())
    assert results["setting"]["frames"] == 20
    assert [row["visual_tokens"] for row in results["rows"]] == [20 * 6]
    assert ", 20 frames of each video; accuracy" in (out / "table.md").read_text()
    capsys.readouterr()
    assert go("msvd", *budget) == 2
    assert "frames was 20, is 8" in capsys.readouterr().err


def test_one_frame_is_a_video(run):
    """65 tokens with the CLS token, which images have not."""
    out, go = run
    assert go("msvd", "--method", "vanilla", "--frames", "1") == 0
    assert json.loads((out / "results.json").read_text())["rows"][0]["visual_tokens"] == 65


def test_more_than_the_context(run, capsys):
    """The question stands at the prompt's end, which would be cut off."""
    out, go = run
    assert go("msvd", "--method", "visionzip", "vanilla", "--tokens", "6", "--frames", "40") == 2
    assert "vanilla: 40 frames of 65 visual tokens and the text are" in capsys.readouterr().err
    assert not list((out / "answers").glob("*.jsonl"))


def test_images_have_no_frames(run, capsys):
    _, go = run
    assert go("pope", "--method", "vanilla", "--frames", "16") == 2
    assert "--frames 16: this benchmark has no videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "of_videos", "of_images"),
    [
        ("LanguageBind/Video-LLaVA-7B", "llava_v1", "vicuna_v1"),
        ("llava-hf/LLaVA-NeXT-Video-7B-hf", "llava_v1", "vicuna_v1"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "qwen_1_5", "qwen_1_5"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "mistral_instruct", "mistral_instruct"),
    ],
)
def test_templates(name: str, of_videos: str, of_images: str):
    """Video-LLaVA's protocol names one of Vicuna's, which is not for the models of other language models."""
    assert template_for(name, BENCHMARKS["msvd"]) == of_videos
    assert template_for(name, BENCHMARKS["pope"]) == of_images

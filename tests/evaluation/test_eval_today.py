"""``eval run`` on today's families: their own processor and template in batches, with every method that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from seam_checkpoints import save_checkpoint

from eval.__main__ import main as eval_command
from eval.benchmarks import scenes
from eval.config import RunConfig
from eval.models import kind_of
from eval.models.hf import ProcessorModel
from eval.records import Question
from eval.running.methods import Run, plan
from llava.model.stock.processor_model import load_processor
from visionzip import visionzip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("today")
    return {name: save_checkpoint(name, folder / name) for name in ("qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")}


def load(folder: Path) -> ProcessorModel:
    checkpoint = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    return kind_of(checkpoint).load(RunConfig("scenes", str(folder), Path("out"), device="cpu"))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def test_a_batch_is_answered_as_its_questions_alone(name: str, checkpoints: dict[str, Path], scenes_data: Path):
    """Text and images in one left-padded batch, zipped and not; the zipped model brings T tokens of each image."""
    model = load(checkpoints[name])
    prompts = model.prepare([Question(0, "Hello there"), *scenes.questions(scenes_data)[:2]])
    whole = [one.visual_tokens for one in model.answers_to(prompts, model.visuals_of(prompts), 2)]
    for run in (Run("visionzip", 5), Run("divprune", 5), Run("visionzip", 6, split=(5, 1)), Run("visionzip-plus", 5)):
        with model.attached(run):
            together = model.answers_to(prompts, model.visuals_of(prompts), 4)
            alone = [model.answers_to([prompt], model.visuals_of([prompt]), 4)[0] for prompt in prompts]
        assert [one.text for one in together] == [one.text for one in alone]
        pictures = [0, 5, 5] if name == "internvl" else [0, 1, 1]  # a picture, or its four tiles and the whole of it
        assert [one.visual_tokens for one in together] == [one.visual_tokens for one in alone]
        assert [one.visual_tokens for one in together] == [run.tokens * count for count in pictures]
    assert whole[1] == {"internvl": 5 * 16, "gemma3": 16}.get(name, 64)
    assert [one.visual_tokens for one in model.answers_to(prompts, model.visuals_of(prompts), 2)] == whole


def test_answers_are_those_of_the_model_and_its_processor(checkpoints: dict[str, Path], scenes_data: Path):
    """By hand: template, processor, ``visionzip`` and ``generate``."""
    asked = load(checkpoints["qwen3_vl"])
    (prompt,) = asked.prepare(scenes.questions(scenes_data)[:1])
    with asked.attached(Run("visionzip", 6)):
        (given,) = asked.answers_to([prompt], asked.visuals_of([prompt]), 6)
    processor, model = asked._processor, asked.inner
    question = prompt.question
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question.text}<|im_end|>\n"
    inputs = processor(text=f"{text}<|im_start|>assistant\n", images=question.visuals[0].open(), return_tensors="pt")
    output = visionzip(model, keep=6).generate(**inputs, do_sample=False, max_new_tokens=6)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert given.text == processor.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("method", ["fastv", "sparsevlm"])
def test_pruning_inside_where_the_layers_are_known(method: str, checkpoints: dict[str, Path], scenes_data: Path):
    """InternVL's language model is Qwen2; of those with other layers or three axes of positions it is refused."""
    model = load(checkpoints["internvl"])
    prompts = model.prepare(scenes.questions(scenes_data)[:2])
    run = Run(method, 8)
    with model.attached(run):
        given = model.answers_to(prompts, model.visuals_of(prompts), 2)
        fill, own = model.prefill(80 + 20, 20, run)
        cache = fill().past_key_values
    assert own and cache.get_seq_length(0) == 100
    assert cache.get_seq_length(1) == 60 if method == "fastv" else 55 <= cache.get_seq_length(1) <= 60
    assert given[0].visual_tokens == 80
    for name, reason in (("qwen3_vl", "have any number of tokens"), ("gemma3", "prune inside layers of llama")):
        with pytest.raises(ValueError, match=f"--method {method}: .* {reason}"):
            load(checkpoints[name]).attach(run)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_resize_is_as_many_tokens_by_a_smaller_picture(name: str, checkpoints: dict[str, Path], scenes_data: Path):
    """By the processor's own limit of pixels: whole tokens on each side, so at most T; counted as they are."""
    model = load(checkpoints[name])
    prompts = model.prepare(scenes.questions(scenes_data)[:2])
    whole = model.answers_to(prompts, model.visuals_of(prompts), 4)
    for tokens, side in ((20, 4), (16, 4), (9, 3), (200, 8)):
        with model.attached(Run("resize", tokens)):
            given = model.answers_to(prompts, model.visuals_of(prompts), 4)
        assert [one.visual_tokens for one in given] == [side * side] * 2
    assert [one.text for one in given] == [one.text for one in whole]  # of the last budget, which is no smaller
    with model.attached(Run("resize", 16)):
        (small,) = model.answers_to(prompts[:1], model.visuals_of(prompts[:1]), 4)
    processor = load_processor(str(checkpoints[name]))
    size = {"shortest_edge": 256, "longest_edge": 16 * 8 * 8}
    image = prompts[0].question.visuals[0].open()[0]
    inputs = processor(text=prompts[0].text, images=image, size=size, return_tensors="pt")
    output = model.inner.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert small.text == processor.decode(output, skip_special_tokens=True).strip()


def test_resize_where_pictures_have_one_size(checkpoints: dict[str, Path], make_checkpoint: Callable[..., Path]):
    for name in ("internvl", "gemma3"):
        with pytest.raises(
            ValueError, match=r"resize makes pictures smaller, but .* gives a model all pictures in one size"
        ):
            load(checkpoints[name]).attach(Run("resize", 4))
    with pytest.raises(ValueError, match="resize makes pictures smaller, but LlavaLlamaForCausalLM gets all pictures"):
        load(make_checkpoint()).attach(Run("resize", 4))
    with pytest.raises(ValueError, match="--method resize: --positions and --size-bias are for tokens that are chosen"):
        plan(["resize"], [4], 1, positions="original")


def test_the_command(checkpoints: dict[str, Path], scenes_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Scores, tokens and cost of a zipped Qwen3-VL beside the whole one and smaller pictures."""
    command = ["run", "scenes", "--model-path", str(checkpoints["qwen3_vl"]), "--data", str(scenes_data)]
    command += ["--device", "cpu", "--limit", "6", "--batch-size", "3", "--output", str(tmp_path)]
    assert eval_command([*command, "--method", "vanilla", "visionzip", "resize", "--tokens", "6"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["visual_tokens"] for row in rows] == [64, 6, 4]
    assert rows[0]["flops"] > rows[1]["flops"] > 0 and rows[1]["prefill_seconds"]["median"] > 0
    assert torch.is_inference_mode_enabled() is False
    for more, message in (
        (
            ["--method", "fastv", "--tokens", "6"],
            "--method fastv: images of Qwen3VLForConditionalGeneration have",
        ),
        (["--method", "pool", "--tokens", "6"], "method='pool' averages areas"),
        (["--method", "vanilla", "--conv-mode", "v1"], "has a chat template of its own, so leave the flag out"),
    ):
        assert eval_command([*command, *more]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]

"""Models that eval runs: LLaVA's families by LLaVA's prompts, any other by its own processor and chat template."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from hf_models import PATCHES
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from checkpoints import edit_config
from eval.__main__ import main as eval_command
from eval.config import RunConfig
from eval.models import kind_of
from eval.models.hf import ProcessorModel, question_prompt
from eval.models.llava import LlavaModel
from eval.records import Question
from eval.running.methods import Run, trained_setting
from eval.running.setting import with_own_language
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints.layouts import KINDS


@pytest.fixture(scope="module")
def other_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a family that LLaVA's interface does not know, as its hub page would have it."""
    folder = tmp_path_factory.mktemp("vip") / "vip-llava-tiny"
    config = VipLlavaConfig(
        vision_config=hf_models.vision_config(),
        text_config=hf_models.text_config(),
        image_token_index=hf_models.IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layers=[-2, -1],
        pad_token_id=hf_models.PAD,
    )
    hf_models.build(VipLlavaForConditionalGeneration, config).save_pretrained(folder)
    hf_models.llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def run(other_family: Path, scenes_data: Path, tmp_path: Path) -> list[str]:
    places = ["--model-path", str(other_family), "--data", str(scenes_data), "--output", str(tmp_path / "out")]
    return ["run", "scenes", *places, "--device", "cpu", "--limit", "6", "--batch-size", "3"]


def answers_of(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "answers" / "vanilla.jsonl").read_text().splitlines()]


def load(folder: Path) -> ProcessorModel:
    return ProcessorModel.load(RunConfig("scenes", str(folder), Path("out"), device="cpu"))


@pytest.mark.parametrize("model_type", list(KINDS))
def test_llavas_families_have_llavas_prompts(model_type: str):
    checkpoint = SimpleNamespace(model_type=model_type, text_config={}, vision_config={})
    assert kind_of(checkpoint) is LlavaModel
    assert kind_of(SimpleNamespace(model_type="llava_llama", mm_vision_tower="clip")) is LlavaModel
    checkpoint.model_type = "vipllava"
    assert kind_of(checkpoint) is ProcessorModel


def test_a_family_of_its_own_answers_as_it_does_alone(run: list[str], other_family: Path, tmp_path: Path):
    """Its processor, template and generate by hand, one question at a time; visual tokens and costs are counted."""
    assert eval_command([*run, "--method", "vanilla"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["rows"]
    assert row["visual_tokens"] == PATCHES and row["prefill_seconds"]["median"] > 0 and row["flops"] > 0
    asked = load(other_family)
    processor, model = hf_models.llava_processor(), asked.inner
    (questions, found) = (scenes_questions(run), answers_of(tmp_path / "out"))
    assert results["setting"]["first_prompt"] == f"user:<image>{questions[0].text} assistant:"
    for question, text in zip(questions[:6], found, strict=True):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        (image,) = question.visuals[0].open()
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == text


def scenes_questions(run: list[str]) -> list[Question]:
    from eval.benchmarks import scenes  # noqa: PLC0415

    return scenes.questions(Path(run[run.index("--data") + 1]))


def test_what_it_cannot_do_is_said_in_one_line(run: list[str], other_family: Path, capsys):
    for more, message in (
        (["--method", "visionzip", "--tokens", "4"], "method='visionzip' reads the attention of the image encoder"),
        (["--method", "vanilla", "--conv-mode", "v1"], "has a chat template of its own, so leave the flag out"),
        (["--method", "vanilla", "--load-8bit"], "--load-8bit is for LLaVA's families"),
    ):
        assert eval_command([*run, *more]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
    with pytest.raises(
        ValueError, match="--method fastv: images of VipLlavaForConditionalGeneration have any number of tokens"
    ):
        load(other_family).attach(Run("fastv", 4))


def test_images_stand_where_the_question_has_them():
    processor, visual = hf_models.llava_processor(), SimpleNamespace(frames=None)

    def prompt(text: str, *visuals: Any) -> str:
        return question_prompt(Question(1, text, visuals), processor)

    assert prompt("Which?", visual, visual) == "user:<image><image>Which? assistant:"
    assert prompt("Is <image> as <image>?", visual, visual) == "user:Is <image> as <image>? assistant:"
    assert prompt("Hello") == "user:Hello assistant:"
    with pytest.raises(ValueError, match="its text has 1 <image> for 2 images"):
        prompt("Is it <image>?", visual, visual)
    with pytest.raises(ValueError, match="videos are asked about with LLaVA's families"):
        prompt("What?", SimpleNamespace(frames=8))


def test_text_and_images_share_a_batch(other_family: Path, scenes_data: Path):
    from eval.benchmarks import scenes  # noqa: PLC0415

    model = load(other_family)
    prompts = model.prepare([Question(0, "Hello there"), *scenes.questions(scenes_data)[:2]])
    together = model.answers_to(prompts, model.visuals_of(prompts), 4)
    alone = [model.answers_to([prompt], model.visuals_of([prompt]), 4)[0] for prompt in prompts]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.visual_tokens for one in together] == [one.visual_tokens for one in alone] == [0, PATCHES, PATCHES]
    assert torch.is_inference_mode_enabled() is False


def test_every_budget_has_the_layer_and_the_merging_that_a_checkpoint_was_tuned_with(make_checkpoint: Any):
    """Whatever chooses, with which budget; what prunes in the language model has neither."""
    tokenizer, inner, processor, _ = load_pretrained_model(str(make_checkpoint()), device="cpu")
    model = LlavaModel(inner, tokenizer, processor, "plain")
    model.trained = trained_setting(SimpleNamespace(visionzip={"dominant": 5, "layer": -3, "merge": "average"}))
    assert model.trained == {"layer": -3, "merge": "average"} and trained_setting(SimpleNamespace()) == {}
    runs = [Run("visionzip", 7), Run("visionzip", 7, split=(4, 3)), Run("plus-choice", 7), Run("random", 7, seed=1)]
    for run in runs:
        with model.attached(run):
            own = inner.get_vision_tower().visionzip
            assert (own.layer, own.merge, own.tokens(16)) == (-3, "average", 7)
            assert inner.config.visionzip["layer"] == -3
        assert inner.get_vision_tower().visionzip is None
    for run in (Run("vanilla"), Run("fastv", 7)):
        with model.attached(run):
            assert inner.get_vision_tower().visionzip is None


def test_a_run_keeps_them(make_checkpoint: Any, scenes_data: Path, tmp_path: Path):
    folder = shutil.copytree(make_checkpoint(), tmp_path / "tuned")
    edit_config(folder, visionzip={"dominant": 5, "contextual": 2, "layer": -3, "merge": "average"})
    places = ["--model-path", str(folder), "--data", str(scenes_data), "--output", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="reads encoder layer -3, but this model was trained on"):
        assert eval_command(["run", "scenes", *places, "--device", "cpu", "--limit", "1", "--method", "visionzip"]) == 0


def test_a_checkpoints_own_budget_comes_with_its_own_positions_and_size_bias():
    checkpoint = SimpleNamespace(visionzip={"dominant": 5, "contextual": 2, "positions": "original", "size_bias": True})
    config = RunConfig("scenes", "checkpoint", Path("out"))
    own = with_own_language(config, checkpoint)
    assert (own.positions, own.size_bias) == ("original", True)
    flags = replace(config, positions="consecutive", size_bias=False)
    assert with_own_language(flags, checkpoint) == flags
    for other in (replace(config, tokens=(16,)), replace(config, dominant=5, contextual=2)):
        assert with_own_language(other, checkpoint) == other

"""The small Qwen3-VL that is trained here: the shipped checkpoint answers, and the recipe that makes it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from eval.benchmarks import scenes
from eval.models.hf import ProcessorModel
from eval.running.methods import Run
from llava.constants import IGNORE_INDEX
from llava.model.stock.processor_model import inputs_of, load_model, load_processor, prompt_of, user_turn
from llava.train.running.run import TrainingArguments
from playground.qwen_mini import EDGE, STAGES, export, start
from playground.qwen_training import AnswerModel, Collate, MiniArguments, Scenes, train
from playground.scenes import TEST_SET, write_training_data

CHECKPOINT = Path(__file__).parents[2] / "checkpoints/qwen-mini"


@pytest.fixture(scope="module")
def model() -> ProcessorModel:
    processor = load_processor(str(CHECKPOINT))
    return ProcessorModel(load_model(str(CHECKPOINT), processor, "cpu", torch.float32), processor)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_training_data(folder, 4)
    return folder


def test_the_checkpoint_is_small_and_of_its_family(model: ProcessorModel):
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 12e6
    assert type(model.inner) is Qwen3VLForConditionalGeneration
    vision = model.inner.config.vision_config
    assert (vision.spatial_merge_size, vision.deepstack_visual_indexes) == (2, [1, 2, 3])


def test_the_checkpoint_answers_with_all_tokens_and_with_half(model: ProcessorModel):
    """Nearly all of the first questions of the test set; a smaller picture costs more of them than choosing."""
    prompts, truth = model.prepare(scenes.questions(TEST_SET)[:40]), scenes.truth(TEST_SET)
    visuals, right = model.visuals_of(prompts), {}
    for run in (Run("vanilla"), Run("visionzip-plus", 18), Run("resize", 18)):
        with model.attached(run):
            given = model.answers_to(prompts, visuals, 8)
        right[run.method] = sum(
            scenes.is_right(one.text, truth[prompt.question.id][1]) for one, prompt in zip(given, prompts, strict=True)
        )
    assert right["vanilla"] >= 37 and right["visionzip-plus"] >= 35, right
    assert right["resize"] < right["visionzip-plus"], right


@pytest.mark.parametrize("side", [6, 3])
def test_training_sees_what_the_stock_model_sees(side: int, model: ProcessorModel, drawn: Path):
    """Questions that share a picture, in one batch: the loss is that of each prompt alone, in the model as it is."""
    own, processor = model.inner, model._processor
    data = Scenes(drawn, processor, turns=3)
    batch = Collate(processor, {side: 1.0})([data[0], data[1]])
    pixels, losses = (side * EDGE) ** 2, []
    for sample, record in ((data[0], data.records[0]), (data[1], data.records[1])):
        for question, said in zip(record["conversations"][::2], sample["said"], strict=False):
            text = prompt_of(processor, [user_turn(question["value"].removeprefix("<image>\n"), 1)])
            size = {"shortest_edge": pixels, "longest_edge": pixels}
            inputs = inputs_of(processor, [text + processor.decode(said)], [[sample["image"]]], size)
            labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
            labels[0, -len(said) :] = torch.tensor(said)
            with torch.inference_mode():
                logits = own(**inputs).logits[0, -len(said) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="none"))
    with torch.inference_mode():
        loss = AnswerModel(own)(**batch)["loss"]
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_the_recipe_runs_from_llava_mini(drawn: Path, tmp_path: Path):
    """A step of each stage, then a checkpoint that loads: words start as llava-mini knows them."""
    start(drawn, tmp_path / "start")
    folder = tmp_path / "start"
    for stage in STAGES:
        training = TrainingArguments(
            output_dir=str(tmp_path / stage),
            max_steps=1,
            per_device_train_batch_size=2,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
        )
        train(MiniArguments(data=str(drawn), init=str(folder), stage=stage), training)
        (tmp_path / f"done-{stage}").write_text("1 s\n")
        folder = tmp_path / stage
    export(tmp_path, tmp_path / "out")
    facts = json.loads((tmp_path / "out/training.json").read_text())
    assert [facts[stage]["images_seen"] for stage in STAGES] == [2, 2]
    made = load_model(str(tmp_path / "out"), load_processor(str(tmp_path / "out")), "cpu", "auto")
    assert made.dtype == torch.bfloat16
    before = load_model(str(tmp_path / "start"), load_processor(str(tmp_path / "start")), "cpu", torch.float32)
    moved = {
        name
        for name, value in before.state_dict().items()
        if not torch.equal(value.bfloat16(), made.state_dict()[name])
    }
    assert {"model.visual.patch_embed.proj.weight", "lm_head.weight"} <= moved

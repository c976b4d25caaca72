"""Training: what of a conversation is learnt, LLaVA's two stages, and the vision tower from nothing."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
)

from checkpoints import CLIP, LANGUAGE_MODEL, TOWER_PREFIX, picture, scale_up, write_tokenizer, write_tower
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.tokenizer import load_tokenizer
from llava.train import contrastive
from llava.train import train as llava_training
from llava.train.contrastive import ContrastiveModel, TowerArguments, collate, new_tower, word_ids
from llava.train.data import Collator, InstructionData, attention_apart, render, tokenize, tokenize_apart
from visionzip import VisionZipConfig

TRAINER = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation in LLaVA's format; the human begins."""
    return [
        {"from": speaker, "value": text}
        for speaker, text in zip(itertools.cycle(["human", "gpt"]), texts, strict=False)
    ]


def command(main: Callable[[], int], **flags: Any) -> int:
    """Exit status of ``python -m llava.train.… --flag value …``."""
    with pytest.MonkeyPatch.context() as patch:
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        patch.setattr(sys, "argv", ["command", *words])
        return main()


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """LLaVA's kind of tokenizer, by its ``legacy`` setting."""
    made = {}
    for legacy in (False, True):
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder, legacy=legacy)
        made[legacy] = load_tokenizer(folder)
    return made


# What is learnt


def learnt(input_ids: Tensor, labels: Tensor, tokenizer: Any) -> list[str]:
    """The stretches of text that are learnt; labels are the ids themselves there."""
    assert (labels[labels != IGNORE_INDEX] == input_ids[labels != IGNORE_INDEX]).all()
    groups = itertools.groupby(labels.tolist(), key=lambda label: label != IGNORE_INDEX)
    return [tokenizer.decode(list(group)) for is_learnt, group in groups if is_learnt]


@pytest.mark.parametrize(
    ("version", "end"), [("v1", "</s>"), ("llava_llama_2", " </s>"), ("chatml_direct", "<|im_end|>")]
)
@pytest.mark.parametrize("before", ["", "<image>\n"])
def test_answers_and_their_ends_are_learnt(version: str, end: str, before: str, tokenizers):
    said = turns(f"{before}What is there?", "A red ring.", "Where is it?", "top left", "And that?", "2 x 日本")
    prompt, spans = render(said, version)
    input_ids, labels = tokenize(prompt, spans, tokenizers[False])
    assert learnt(input_ids, labels, tokenizers[False]) == [f"A red ring.{end}", f"top left{end}", f"2 x 日本{end}"]
    assert (IMAGE_TOKEN_INDEX in input_ids) == bool(before)


def test_captions_are_learnt_whole():
    """``plain``, for the first stage: the image, the caption and a line break; the human's words are dropped."""
    assert render(turns("<image>\nDescribe it.", "A red ring."), "plain") == ("<image>A red ring.\n", [(7, 19)])


def test_a_caption_is_learnt_but_for_the_image(tokenizers):
    input_ids, labels = tokenize(*render(turns("Describe it.\n<image>", "A red ring."), "plain"), tokenizers[False])
    caption = tokenizers[False]("A red ring.\n").input_ids[1:]
    assert input_ids.tolist() == [1, IMAGE_TOKEN_INDEX, *caption]
    assert labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, *caption]


def test_the_image_comes_first():
    prompt, _ = render(turns("What is there? <image>", "A ring."), "v1")
    assert prompt.endswith("USER: <image>\nWhat is there? ASSISTANT: A ring.</s>")


@pytest.mark.parametrize("speakers", [[], ["human"], ["gpt", "human"], ["human", "gpt", "human"], ["human", "human"]])
def test_turns_must_alternate(speakers: list[str]):
    with pytest.raises(ValueError, match="they must be human, gpt, human, gpt"):
        render([{"from": speaker, "value": "Hi"} for speaker in speakers], "v1")


def test_turns_apart_are_prompts_with_a_common_start(tokenizers):
    """Each question as if it were the first about the image; what all begin with is there once."""
    said = turns("<image>\nHow many rings?", "2", "Where is the ring?", "top left", "Is it red?", "yes")
    tokenizer = tokenizers[False]
    input_ids, labels, numbers = tokenize_apart(said, "v1", tokenizer)
    assert numbers.unique_consecutive().tolist() == [0, 1, 2, 3]
    assert (labels[numbers == 0] == IGNORE_INDEX).all() and IMAGE_TOKEN_INDEX in input_ids[numbers == 0]
    for number, (question, answer) in enumerate(zip(said[::2], said[1::2], strict=True), start=1):
        question["value"] = "<image>\n" + question["value"].removeprefix("<image>\n")
        alone_ids, alone_labels = tokenize(*render([question, answer], "v1"), tokenizer)
        seen = (numbers == 0) | (numbers == number)
        assert torch.equal(input_ids[seen], alone_ids) and torch.equal(labels[seen], alone_labels)
    single_ids, single_labels, only = tokenize_apart(said[:2], "v1", tokenizer)
    assert torch.equal(single_ids, tokenize(*render(said[:2], "v1"), tokenizer)[0]) and not only.any()
    assert (single_labels != IGNORE_INDEX).any()


def test_attention_apart():
    """Two tokens in common, turns of two and one, then padding."""
    mask, positions = attention_apart(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert positions[0, :5].tolist() == [0, 1, 2, 3, 2]
    assert (mask[0, 0] == 0).int().tolist()[:5] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]


def counted_labels(prompt: str, tokenizer: Any, *, after_separator: int) -> list[int] | None:
    """LLaVA's own way to the labels, which counts the tokens of parts of the prompt that it tokenizes alone.

    Args:
        prompt: in the template ``v1``.
        tokenizer: LLaVA's.
        after_separator: how many tokens fewer a round has inside the prompt, where it comes after ``</s>``, than alone,
            where SentencePiece puts a blank before it.

    Returns:
        The labels; None if the counts do not add up, in which case LLaVA drops the sample.
    """
    ids = tokenizer_image_token(prompt, tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    position = 1  # after the beginning-of-sequence token
    for number, text in enumerate(prompt.split("</s>")[:-1]):
        question, _ = text.split(" ASSISTANT: ")
        fewer = after_separator if number else 0
        # Alone, a round has a beginning-of-sequence token too many and its </s> too few.
        length = len(tokenizer_image_token(text, tokenizer)) - fewer
        # Of the question, too, and the blank at its end is in the answer's first token.
        ignored = len(tokenizer_image_token(f"{question} ASSISTANT: ", tokenizer)) - 2 - fewer
        answer = slice(position + ignored, position + length)
        labels[answer] = ids[answer]
        position += length
    return labels if position == len(ids) else None


letters = st.characters(codec="utf-8", exclude_characters="<>▁")
words = st.sampled_from(["A", "red", "ring", "top", "left", "x7", "日本", "\n", "é", ".", "the", " "])
texts = st.one_of(st.text(letters, max_size=12), st.lists(words, max_size=5).map(" ".join)).map(str.strip).filter(bool)


@given(legacy=st.booleans(), has_image=st.booleans(), rounds=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_labels_are_those_of_llava(legacy: bool, has_image: bool, rounds: list[tuple[str, str]], tokenizers):
    """Also from the second round on, where one count is off by one with ``legacy: false``, as in Vicuna."""
    tokenizer = tokenizers[legacy]
    said = turns(*itertools.chain.from_iterable(rounds))
    if has_image:
        said[0]["value"] += "\n<image>"
    prompt, spans = render(said, "v1")
    input_ids, labels = tokenize(prompt, spans, tokenizer)
    assert input_ids.tolist() == tokenizer_image_token(prompt, tokenizer)
    assert labels.tolist() == counted_labels(prompt, tokenizer, after_separator=int(not legacy))
    if len(rounds) > 1:
        assert counted_labels(prompt, tokenizer, after_separator=int(legacy)) is None


# The data set


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training starts from: a language model in ``base``, a vision tower in ``tower``, ``images``, ``data.json``.

    Records 0 to 7 have an image, 8 and 9 are text only.
    """
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    own = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith(("mm_", "image_"))}
    LlamaForCausalLM(LlamaConfig(**own)).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    encoder = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    scale_up(encoder)
    weights = {f"vision_model.{key}": value for key, value in encoder.state_dict().items()}
    write_tower(folder / "tower", CLIP, weights)
    (folder / "images").mkdir()
    records = []
    for index in range(8):
        picture(index).save(folder / "images" / f"{index}.png")
        said = turns("<image>\nWhat is it?", f"the {index}", "And then?", "nothing")
        records.append({"id": f"seen-{index}", "image": f"{index}.png", "conversations": said})
    records += [{"id": f"read-{index}", "conversations": turns("What is left?", f"{index}")} for index in (8, 9)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def dataset(world: Path, tokenizers, tmp_path: Path) -> Callable[..., InstructionData]:
    """``InstructionData`` of the world's records or of others."""

    def make(records: Any = None, **options: Any) -> InstructionData:
        path = world / "data.json"
        if records is not None:
            path = tmp_path / "other.json"
            path.write_text(json.dumps(records))
        values = {
            "data_path": str(path),
            "image_folder": str(world / "images"),
            "tokenizer": tokenizers[False],
            "version": "v1",
            "image_processor": CLIPImageProcessorPil.from_pretrained(world / "tower"),
            "model_config": SimpleNamespace(image_aspect_ratio="pad"),
        }
        return InstructionData(**{**values, **options})

    return make


def test_samples_have_the_image_as_the_model_is_asked_with_it(dataset):
    data = dataset()
    assert len(data) == 10
    expected = process_images([picture(3)], data.image_processor, data.model_config)[0]
    assert torch.equal(data[3]["image"], expected)
    assert learnt(data[3]["input_ids"], data[3]["labels"], data.tokenizer) == ["the 3</s>", "nothing</s>"]


def test_samples_without_an_image_have_a_black_one(dataset):
    """So that all processes use the projector; it has no place in the prompt."""
    sample = dataset()[8]
    assert torch.equal(sample["image"], torch.zeros(3, 56, 56))
    assert IMAGE_TOKEN_INDEX not in sample["input_ids"]
    siglip = SiglipImageProcessorPil(size={"height": 70, "width": 70})
    assert dataset(image_processor=siglip)[8]["image"].shape == (3, 70, 70)


def test_a_language_model_reads_what_is_text_only(dataset):
    data = dataset(image_processor=None, image_folder=None)
    assert [record["id"] for record in data.records] == ["read-8", "read-9"]
    assert data[0].keys() == {"input_ids", "labels"}


def test_a_record_that_cannot_be_used_is_named(dataset, world: Path, tmp_path: Path):
    shutil.copy(world / "images/0.png", tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((world / "images/1.png").read_bytes()[:3000])
    good = turns("<image>", "A ring.")
    data = dataset(
        [
            {"id": "fine", "image": "whole.png", "conversations": good},
            {"id": "lost", "image": "none.png", "conversations": good},
            {"id": "damaged", "image": "cut.png", "conversations": good},
            {"id": "mute", "image": "whole.png", "conversations": good[:1]},
            {"image": "whole.png", "conversations": good[1:]},
        ],
        image_folder=str(tmp_path),
    )
    assert data[0]["image"].shape == (3, 56, 56)
    for index, message in (
        (1, r"record 'lost' cannot be used: no image file at .*none\.png"),
        (2, r"record 'damaged' cannot be used: .*cut\.png is not a readable image"),
        (3, "record 'mute' cannot be used: the turns are from human;"),
        (4, "record 4 cannot be used: the turns are from gpt;"),
    ):
        with pytest.raises(ValueError, match=message):
            data[index]


def test_a_fraction_is_a_seeded_sample(dataset):
    records = [{"id": index, "conversations": turns("Hi", "Yes?")} for index in range(40)]

    def chosen(fraction: float, seed: int) -> list[int]:
        return [record["id"] for record in dataset(records, fraction=fraction, seed=seed).records]

    assert chosen(0.1, 0) == chosen(0.1, 0) == sorted(set(chosen(0.1, 0)))
    assert [len(chosen(fraction, 0)) for fraction in (1, 0.5, 0.1, 0.001)] == [40, 20, 4, 1]
    samples = [chosen(0.1, seed) for seed in range(100)]
    assert len(set(map(tuple, samples))) > 90
    assert set().union(*samples) == set(range(40))  # uniform: each comes up sometimes


def test_data_that_cannot_be_used(dataset, tmp_path: Path):
    for options, message in (
        ({"data_path": "/nowhere.json"}, "no training data at /nowhere.json"),
        ({"image_folder": "/nowhere"}, r"image_folder='/nowhere' is no folder, but .*data\.json has images"),
        ({"image_folder": None}, "image_folder=None is no folder"),
        ({"fraction": 0}, r"data_fraction=0 is not in \(0, 1\]"),
        ({"fraction": 1.5}, r"data_fraction=1\.5 is not in \(0, 1\]"),
        ({"records": []}, r"other\.json is not a list of records"),
        ({"records": {"conversations": []}}, r"other\.json is not a list of records"),
        ({"records": ["Why?"]}, r"other\.json is not a list of records"),
        ({"records": [{"question": "Why?"}]}, r"other\.json is not a list of records"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            dataset(**options)


def test_a_batch_is_padded_on_the_right(dataset):
    data = dataset()
    samples = [data[0], data[8]]
    long, short = (len(sample["input_ids"]) for sample in samples)
    batch = Collator(data.tokenizer, 2048)(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, long)
    assert batch["attention_mask"].sum(dim=1).tolist() == [long, short]
    assert torch.equal(batch["input_ids"][1, :short], samples[1]["input_ids"])
    assert torch.equal(batch["labels"][1, :short], samples[1]["labels"])
    assert (batch["labels"][1, short:] == IGNORE_INDEX).all()
    assert batch["attention_mask"][1].tolist() == [1] * short + [0] * (long - short)
    assert [image.shape for image in batch["images"]] == [(3, 56, 56)] * 2


def test_a_batch_is_cut_at_the_longest_length(dataset):
    data = dataset(image_processor=None)
    batch = Collator(data.tokenizer, 20)([data[0], data[1]])
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(batch, (2, 20))
    assert "images" not in batch


# LLaVA's two stages


@pytest.fixture(scope="module")
def llava(world: Path) -> Callable[..., int]:
    """``python -m llava.train.train`` on the world's data, for four steps unless told otherwise."""

    def run(out: Path, **flags: Any) -> int:
        own = {"output_dir": out, "data_path": world / "data.json", "image_folder": world / "images", "max_steps": 4}
        return command(llava_training.main, **{**TRAINER, **own, **flags})

    return run


@pytest.fixture(scope="module")
def projector(world: Path, llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage's folder."""
    out = tmp_path_factory.mktemp("projector")
    new = {"model_name_or_path": world / "base", "vision_tower": world / "tower"}
    assert llava(out, **new, tune_mm_mlp_adapter=True, version="plain", data_path=captions(world), save_steps=2) == 0
    return out


def captions(world: Path) -> Path:
    path = world / "captions.json"
    records = json.loads((world / "data.json").read_text())[:8]
    path.write_text(json.dumps([{**record, "conversations": record["conversations"][:2]} for record in records]))
    return path


@pytest.fixture(scope="module")
def second_stage(world: Path, projector: Path) -> dict[str, Any]:
    """Its arguments, beside the folder."""
    return {
        "model_name_or_path": world / "base",
        "vision_tower": world / "tower",
        "pretrain_mm_mlp_adapter": projector / "mm_projector.safetensors",
        "mm_projector_lr": 1e-3,
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def tuned(llava, second_stage: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second stage's folder."""
    out = tmp_path_factory.mktemp("tuned")
    assert llava(out, **second_stage) == 0
    return out


def weights_by_part(file: Path) -> dict[str, dict[str, Tensor]]:
    """A model's weights: of its ``projector``, its ``tower`` and its ``language`` model."""
    parts: dict[str, dict[str, Tensor]] = {"projector": {}, "tower": {}, "language": {}}
    for key, value in load_file(file).items():
        part = "projector" if "mm_projector" in key else "tower" if key.startswith(TOWER_PREFIX) else "language"
        parts[part][key.removeprefix(TOWER_PREFIX)] = value
    return parts


def assert_same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert not [key for key, value in weights.items() if not torch.equal(value, expected[key])]


def furthest(weights: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, float]:
    """How far each weight has moved."""
    return {key: (value - before[key]).abs().max().item() for key, value in weights.items()}


def test_the_first_stage_learns_the_projector_only(world: Path, projector: Path):
    early, late = (weights_by_part(projector / f"checkpoint-{step}/model.safetensors") for step in (2, 4))
    assert_same(late["language"], load_file(world / "base/model.safetensors"))
    assert_same(late["tower"], load_file(world / "tower/model.safetensors"))
    assert min(furthest(late["projector"], early["projector"]).values()) > 0
    assert_same(load_file(projector / "mm_projector.safetensors"), late["projector"])


def test_the_first_stages_folder_is_loaded_over_its_language_model(world: Path, projector: Path):
    tokenizer, model, image_processor, _ = load_pretrained_model(str(projector), str(world / "base"), device="cpu")
    assert (projector / "preprocessor_config.json").is_file()  # needed where the tower is in the base's own folder
    expected = weights_by_part(projector / "checkpoint-4/model.safetensors")["projector"]
    assert_same({key: value for key, value in model.state_dict().items() if "mm_projector" in key}, expected)
    images = process_images([picture(0)], image_processor, model.config)
    ids = tokenizer_image_token("<image>", tokenizer, return_tensors="pt")[None]
    assert model.generate(ids, images=images, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)
    assert model.config.use_cache


def test_the_second_stage_learns_projector_and_language_model(world: Path, projector: Path, tuned: Path):
    """Each at its own rate; the tower stays as it is."""
    weights = weights_by_part(tuned / "model.safetensors")
    assert_same(weights["tower"], load_file(world / "tower/model.safetensors"))
    language = furthest(weights["language"], load_file(world / "base/model.safetensors")).values()
    own = furthest(weights["projector"], load_file(projector / "mm_projector.safetensors")).values()
    assert 0 < min(own) <= max(own) < 5e-3 < min(language)  # four steps of at most 1e-3 and 1e-2


def test_the_second_stages_folder_is_a_whole_checkpoint(tuned: Path):
    model = load_pretrained_model(str(tuned), device="cpu")[1]
    assert_same(dict(model.state_dict()), load_file(tuned / "model.safetensors"))
    assert model.get_vision_tower().visionzip is None


def test_a_run_leaves_a_record(tuned: Path):
    """Arguments, versions and losses, and a picture of them."""
    record = record_of(tuned)
    assert record["training"]["mm_projector_lr"] == 1e-3
    assert record["model"]["version"] == "v1"
    assert record["data"]["data_fraction"] == 1
    assert (record["batch_per_step"], record["records"]) == (2, 10)
    assert record["versions"]["torch"] == torch.__version__
    losses = [entry["loss"] for entry in record["losses"] if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert Image.open(tuned / "losses.png").width > 100


def test_a_stopped_run_ends_as_if_it_had_not_been(llava, second_stage: dict[str, Any], tuned: Path, tmp_path: Path):
    """Stopped after step 2 of 4, it has left that checkpoint; the same command goes on there."""
    checkpoint = shutil.copytree(tuned / "checkpoint-2", tmp_path / "run/checkpoint-2")
    written = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert llava(tmp_path / "run", **second_stage) == 0
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == written  # not done again
    assert_same(load_file(tmp_path / "run/model.safetensors"), load_file(tuned / "model.safetensors"))
    runs = [record_of(folder)["losses"][:-1] for folder in (tmp_path / "run", tuned)]
    assert runs[0] == runs[1]


def test_turns_that_do_not_see_each_other(world: Path, llava, tuned: Path, tmp_path: Path, capsys):
    """The loss of packed turns is that of the same turns in records of their own, with an image or without."""
    records = json.loads((world / "data.json").read_text())
    records = [records[0], records[8], next(record for record in records if "image" not in record)]
    for record in records:
        record["conversations"] = [
            *record["conversations"][:2],
            *turns("And how many?", "3 of them", "Why?", "Who knows."),
        ]
    single = []
    for record in records:
        for question, answer in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
            text = question["value"].replace("<image>", "").strip()
            asked = {"from": "human", "value": f"<image>\n{text}" if "image" in record else text}
            single.append({**record, "conversations": [asked, answer]})
    losses = []
    for number, (data, apart) in enumerate(((records, True), (single, False))):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(data))
        flags = {"max_steps": 1, "per_device_train_batch_size": len(data), "save_strategy": "no", "turns_apart": apart}
        assert llava(tmp_path / f"run{number}", model_name_or_path=tuned, data_path=path, **flags) == 0
        losses.append(record_of(tmp_path / f"run{number}")["losses"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert llava(tmp_path / "text", model_name_or_path=world / "base", turns_apart=True) == 2
    assert "turns_apart needs a vision tower" in capsys.readouterr().err


def test_training_with_visionzip(world: Path, llava, tuned: Path, dataset, tmp_path: Path):
    """As the paper's efficient tuning: the projector of a LLaVA, with few visual tokens, on a share of its data."""
    zipped = {"visionzip_dominant": 3, "visionzip_contextual": 2, "tune_mm_mlp_adapter": True}
    share = {"data_fraction": 0.5, "data_seed": 7}
    assert llava(tmp_path, model_name_or_path=tuned, **zipped, **share, max_steps=2, save_strategy="no") == 0
    _, model, image_processor, _ = load_pretrained_model(str(tmp_path), str(tuned), device="cpu")
    assert model.get_vision_tower().visionzip == VisionZipConfig(dominant=3, contextual=2)
    assert model.encode_images(process_images([picture(0)], image_processor, model.config)).shape == (1, 5, 32)
    before, after = load_file(tuned / "model.safetensors"), load_file(tmp_path / "mm_projector.safetensors")
    assert min(furthest(after, before).values()) > 0

    record = record_of(tmp_path)
    assert record["training"]["data_seed"] == 7
    assert record["records"] == [sampled["id"] for sampled in dataset(fraction=0.5, seed=7).records]
    assert record["records"] != [sampled["id"] for sampled in dataset(fraction=0.5).records]


def test_a_llava_goes_on_with_another_tower(llava, tuned: Path, tmp_path: Path):
    """At another resolution, as the embedded model does: projector and language model stay."""
    larger = {**CLIP, "image_size": 84}
    encoder = CLIPVisionModel(CLIPVisionConfig(**larger))
    write_tower(tmp_path / "larger", larger, {f"vision_model.{k}": v for k, v in encoder.state_dict().items()})
    new = {"model_name_or_path": tuned, "vision_tower": tmp_path / "larger"}
    assert llava(tmp_path / "out", **new, learning_rate=0.0, max_steps=1, save_strategy="no") == 0
    weights, before = weights_by_part(tmp_path / "out/model.safetensors"), weights_by_part(tuned / "model.safetensors")
    assert_same(weights["tower"], load_file(tmp_path / "larger/model.safetensors"))
    assert_same({**weights["projector"], **weights["language"]}, {**before["projector"], **before["language"]})
    _, model, image_processor, _ = load_pretrained_model(str(tmp_path / "out"), device="cpu")
    assert model.encode_images(process_images([picture(0)], image_processor, model.config)).shape == (1, 36, 32)


def test_a_whitened_projector_hides_nothing(world: Path):
    """Its hidden layer sees all directions of the features alike, and tokens have the size of embeddings."""
    model = llava_training.build_model(
        llava_training.ModelArguments(model_name_or_path=str(world / "base"), vision_tower=str(world / "tower")),
        llava_training.DataArguments(data_path=""),
    )[1]
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    images = torch.randn(64, 3, 56, 56)
    features = tower(images).flatten(0, 1)
    before = projector[0](features)
    llava_training.whiten_projector(model, images)
    hidden = projector[0](features)
    assert hidden.mean(dim=0).abs().max() < 1e-3
    variances, earlier = (torch.linalg.eigvalsh(values.detach().T.cov()) for values in (hidden, before))
    assert variances[-1] < 1.1
    assert variances.median() / variances[-1] > 3 * earlier.median() / earlier[-1]
    embedded = model.get_input_embeddings().weight.std()
    assert 0.5 * embedded < model.encode_images(images).std() < 2 * embedded


def test_training_a_language_model_alone(world: Path, llava, tmp_path: Path):
    assert llava(tmp_path, model_name_or_path=world / "base", max_steps=2, save_strategy="no") == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(trained) is LlamaForCausalLM
    before = load_file(world / "base/model.safetensors")
    assert min(furthest(dict(trained.state_dict()), before).values()) > 0
    assert load_tokenizer(tmp_path)("Where?").input_ids == load_tokenizer(world / "base")("Where?").input_ids
    assert record_of(tmp_path)["records"] == 2


def test_bad_input_is_one_line_before_training(world: Path, llava, projector: Path, tmp_path: Path, capsys):
    good = {"model_name_or_path": world / "base", "vision_tower": world / "tower"}
    broken = tmp_path / "broken.json"
    broken.write_text("[{")
    for flags, message in (
        ({"model_name_or_path": "/nowhere"}, "/nowhere"),
        ({**good, "vision_tower": "/nowhere"}, "/nowhere"),
        ({**good, "data_path": "/nowhere.json"}, "no training data at /nowhere.json"),
        ({**good, "data_path": broken}, "broken.json is no json"),
        ({**good, "image_folder": "/nowhere"}, "image_folder='/nowhere' is no folder"),
        ({**good, "data_fraction": 2}, "data_fraction=2.0 is not in (0, 1]"),
        ({**good, "pretrain_mm_mlp_adapter": "/nowhere.bin"}, "/nowhere.bin"),
        ({**good, "pretrain_mm_mlp_adapter": world / "base/model.safetensors"}, "mm_projector"),
        ({**good, "visionzip_dominant": 0}, "dominant=0 is below 1"),
        ({"model_name_or_path": world / "base", "tune_mm_mlp_adapter": True}, "give a vision_tower"),
        ({"model_name_or_path": world / "base", "visionzip_dominant": 3}, "give a vision_tower"),
        (
            {"model_name_or_path": world / "base", "data_path": world / "captions.json"},
            "has no record without an image",
        ),
    ):
        assert llava(tmp_path / "run", **flags) == 2, flags
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("llava.train.train: ")
        assert message in last
        assert not list(tmp_path.glob("run/*"))


# The vision tower


def small_tower(**changes: Any) -> dict[str, Any]:
    return {"image_size": 24, "patch_size": 4, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **changes}


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour each, and ``tower.json``, with what is true and what is false of them."""
    folder = tmp_path_factory.mktemp("colors")
    names = ["red", "lime", "blue", "white", "black", "cyan", "magenta", "yellow"]
    records = []
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        Image.new("RGB", (24, 24), name).save(folder / f"{name}.png")
        sentences = {"captions": [f"a {name} image", "an image"], "negatives": [f"a {other} image"]}
        records.append({"image": f"{name}.png", **sentences})
    (folder / "tower.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def train_tower(colors: Path) -> Callable[..., int]:
    """``python -m llava.train.contrastive`` on these images."""

    def run(out: Path, **flags: Any) -> int:
        own = {"output_dir": out, "data_path": colors / "tower.json", "image_folder": colors, "save_strategy": "no"}
        own |= {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
        return command(contrastive.main, **{**TRAINER, **own, **small_tower(), **flags})

    return run


@pytest.fixture(scope="module")
def tower_run(colors: Path, train_tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tower")
    held_out = {"validation_path": colors / "tower.json", "validation_folder": colors}
    assert train_tower(out, max_steps=20, **held_out) == 0
    return out


def sample(captions: list[str], negatives: list[str], edge: int = 24, seed: int = 0) -> dict[str, Any]:
    pixels = torch.randn(3, edge, edge, generator=torch.Generator().manual_seed(seed))
    return {"pixels": pixels, "captions": captions, "negatives": negatives}


BATCH = [
    sample(["a red ring", "a plain background"], ["a blue ring"], seed=1),
    sample(["a blue ring", "a plain background"], ["a red cross"], seed=2),
]


def test_each_image_is_compared_with_the_sentences_of_all():
    """What is false of one image may be true of another."""
    batch = collate(BATCH)
    sentences = ["a red ring", "a plain background", "a blue ring", "a red cross"]
    bags = batch["words"].tensor_split(batch["offsets"][1:].tolist())
    assert [bag.tolist() for bag in bags] == [word_ids(sentence) for sentence in sentences]
    assert batch["truth"].tolist() == [[True, True, False, False], [False, True, True, False]]
    assert batch["pixels"].shape == (2, 3, 24, 24)


def new_model(local_weight: float = 1.0, **changes: Any) -> ContrastiveModel:
    torch.manual_seed(0)
    arguments = TowerArguments(data_path="", image_folder="", **small_tower(**changes))
    return ContrastiveModel(new_tower(arguments), local_weight)


def test_the_loss_is_one_decision_for_each_pair():
    """Yes or no, by three logits: two of the CLS token share one weight, the patches have the other."""
    batch = collate(BATCH)
    output = new_model(local_weight=0.7)(**batch)
    assert output["logits"].shape == (3, 2, 4)
    losses = []
    for logits in output["logits"]:
        pairs = zip(logits.flatten(), batch["truth"].flatten(), strict=True)
        losses.append(-sum((logit if is_true else -logit).sigmoid().log() for logit, is_true in pairs) / len(BATCH))
    torch.testing.assert_close(output["loss"], (losses[0] + losses[1]) / 2 + 0.7 * losses[2])


@pytest.mark.parametrize("local_weight", [0.0, 1.0])
def test_the_decision_by_patches_can_be_left_out(local_weight: float):
    model = new_model(local_weight)
    model(**collate(BATCH))["loss"].backward()
    width = model.tower.config.hidden_size
    gradients = [model.patch_head.weight.grad, model.patch_head.bias.grad, model.sentence[-1].weight.grad[width:]]
    gradients += [model.scale.grad[1], model.bias.grad[1]]
    assert [bool(gradient.any()) for gradient in gradients] == [local_weight > 0] * len(gradients)
    assert model.image_head.weight.grad.any()


def test_the_tower_learns(tower_run: Path):
    """Enough, in 20 steps, to tell what is true of an image from what is not."""
    record = record_of(tower_run)
    losses = [entry["loss"] for entry in record["losses"] if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert record["pair_accuracy"].keys() == {"cls_last_layer", "cls_read_layer", "best_patch"}
    assert min(record["pair_accuracy"].values()) > 0.9


def test_the_folder_is_a_vision_tower(tower_run: Path):
    """Of LLaVA: it reads the patches of the layer before the last, which both decisions have learnt from."""
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(tower_run)))
    trained = torch.load(tower_run / "contrastive.pt")
    own = {f"tower.{key}": value for key, value in tower.encoder.state_dict().items()}
    assert_same(own, {key: value for key, value in trained.items() if key.startswith("tower.")})
    model = new_model()
    model.load_state_dict(trained)
    processor = CLIPImageProcessorPil.from_pretrained(tower_run)
    assert processor.to_dict() == tower.image_processor.to_dict()
    pixels = processor(picture(0), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    with torch.inference_mode():
        expected = model.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(tower(pixels), expected, atol=1e-4, rtol=1e-4)


def test_going_on_at_another_image_size(train_tower, tower_run: Path, tmp_path: Path):
    """6 x 6 positions become 12 x 12; everything else is as it was."""
    assert train_tower(tmp_path, init=tower_run, image_size=48, max_steps=1, learning_rate=0) == 0
    before, after = (torch.load(run / "contrastive.pt") for run in (tower_run, tmp_path))
    name = "tower.embeddings.position_embedding.weight"
    old, new = before.pop(name), after.pop(name)
    assert_same(after, before)
    assert torch.equal(new[0], old[0])  # of the CLS token
    old, new = old[1:].view(6, 6, -1), new[1:].view(12, 12, -1)
    torch.testing.assert_close(new[[0, 0, -1, -1], [0, -1, 0, -1]], old[[0, 0, -1, -1], [0, -1, 0, -1]])
    torch.testing.assert_close(new.mean(dim=(0, 1)), old.mean(dim=(0, 1)))
    # In between, one quarter of the way to the neighbour.
    torch.testing.assert_close(new[1, 0], 0.75 * old[0, 0] + 0.25 * old[1, 0])
    torch.testing.assert_close(new[0, 4], 0.75 * old[0, 2] + 0.25 * old[0, 1])


def test_bad_input_for_the_tower_is_one_line(train_tower, tower_run: Path, colors: Path, tmp_path: Path, capsys):
    for flags, message in (
        ({"init": "/nowhere"}, "/nowhere"),
        ({"init": tower_run, "num_layers": 3}, "has another width, depth or patch size"),
        ({"init": tower_run, "hidden_size": 64}, "has another width, depth or patch size"),
        ({"data_path": "/nowhere.json"}, "/nowhere.json"),
        ({"validation_path": colors / "tower.json"}, "validation_folder"),
    ):
        assert train_tower(tmp_path / "run", max_steps=1, **flags) == 2, flags
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("llava.train.contrastive: ")
        assert message in last
        assert not list(tmp_path.glob("run/*"))

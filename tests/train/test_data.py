"""LLaVA's training data: what is read, what is refused, what a batch is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from training import learnt, turns
from transformers import (
    SiglipImageProcessorPil,
)

from checkpoints import picture
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.train.data import Collator


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
    assert dataset(processor=siglip)[8]["image"].shape == (3, 70, 70)


def test_a_language_model_reads_what_is_text_only(dataset):
    data = dataset(processor=None, image_folder=None)
    assert [record["id"] for record in data.records] == ["read-8", "read-9"]
    assert data[0].keys() == {"record", "input_ids", "labels"}


GOOD = turns("<image>", "A ring.")
UNUSABLE = {
    "lost": ({"image": "none.png", "conversations": GOOD}, r"no image file at .*none\.png"),
    "long": (
        {"image": 301 * "n", "conversations": GOOD},
        rf"no image file at .*/{60 * 'n'}… .301 characters.: is it base",
    ),
    "mute": ({"image": "0.png", "conversations": GOOD[:1]}, "the turns are from human;"),
    "alone": ({"image": "0.png", "conversations": GOOD[1:]}, "the turns are from nobody;"),
    "stranger": ({"conversations": [{"from": "system", "value": "!"}, {"from": "user", "value": "?"}]}, "from user;"),
    "odd": ({"conversations": turns("Why?", "So.", "So?")}, "the turns are from human, gpt, human;"),
    "empty": ({"conversations": turns("Why?", "So.", "So?", "")}, "answer 2 is empty"),
    "blind": ({"image": "0.png", "conversations": turns("Why?", "So.")}, r"it has an image, but 0 turns with <image>"),
    "two": (
        {"image": "0.png", "conversations": turns("<image>", "a", "<image>", "b")},
        "2 turns with <image> .human, human",
    ),
    "answered": ({"image": "0.png", "conversations": turns("Why?", "<image>")}, r"1 turns with <image> \(gpt\)"),
    "album": ({"image": ["0.png"], "conversations": GOOD}, "it must be the name of one file"),
    "torn": ({"conversations": [{"from": "human"}, {"value": "So."}]}, "its conversations are not a list of"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_record_that_cannot_be_used_is_named(name: str, dataset, tmp_path: Path):
    """Before anything is loaded; or it is left out."""
    record, message = UNUSABLE[name]
    records = [{"id": "fine", "image": "1.png", "conversations": GOOD}, {"id": name, **record}]
    with pytest.raises(
        ValueError, match=rf"1 of 2 records of .*other\.json cannot be used: record '{name}': .*{message}"
    ):
        dataset(records)
    assert [kept["id"] for kept in dataset(records, skipped=tmp_path / "skipped").records] == ["fine"]
    with pytest.raises(ValueError, match="None is left"):
        dataset(records[1:], skipped=tmp_path / "skipped")


def test_a_record_with_a_damaged_image(dataset, world: Path, tmp_path: Path):
    """Is found when it is read: an error; or the next one stands in for it, and it is noted."""
    shutil.copy(world / "images/0.png", tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((world / "images/1.png").read_bytes()[:3000])
    records = [
        {"id": "fine", "image": "whole.png", "conversations": GOOD},
        {"id": "damaged", "image": "cut.png", "conversations": GOOD},
    ]
    with pytest.raises(ValueError, match=r"record 'damaged' cannot be used: .*cut\.png is not a readable image"):
        dataset(records, image_folder=tmp_path)[1]
    data = dataset(records, image_folder=tmp_path, skipped=tmp_path / "skipped.jsonl")
    assert torch.equal(data[1]["image"], data[0]["image"])
    notes = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [note["id"] for note in notes] == ["damaged"] and "is not a readable image" in notes[0]["why"]
    only = dataset(records[1:], image_folder=tmp_path, skipped=tmp_path / "skipped.jsonl")
    with pytest.raises(ValueError, match="not one of the records can be used"):
        only[0]


def test_a_first_turn_of_the_model_is_dropped(dataset):
    """As in LLaVA: some of the conversations without an image begin so."""
    said = turns("Why?", "So.")
    data = dataset([{"id": 0, "conversations": [{"from": "gpt", "value": "Hello."}, *said]}, {"conversations": said}])
    assert torch.equal(data[0]["input_ids"], data[1]["input_ids"])


def test_image_markers_in_text_are_text(dataset, log):
    """Without an image ``<image>`` is a word, as in LLaVA; the log says how often."""
    data = dataset([{"id": "page", "conversations": turns("What is <image> in RSS?", "An <image> tag.")}])
    assert "1 records without an image have <image> in their text, such as 'page'" in log.text
    sample = data[0]
    assert IMAGE_TOKEN_INDEX not in sample["input_ids"]
    assert "What is <image> in RSS?" in data.tokenizer.decode(sample["input_ids"])
    assert learnt(sample["input_ids"], sample["labels"], data.tokenizer) == ["An <image> tag.</s>"]


def test_tiles_come_with_the_size_of_their_image(dataset):
    """LLaVA-NeXT lays them out by it."""
    samples = [dataset(aspect_ratio="anyres")[index] for index in (0, 8)]
    assert [sample["image"].shape for sample in samples] == [(3, 3, 56, 56), (3, 56, 56)]
    batch = Collator(dataset().tokenizer, 2048)(samples)
    assert batch["image_sizes"] == [(90, 60), (56, 56)]


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
        ({"version": "v9"}, "conv_mode='v9' is unknown"),
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
    data = dataset(processor=None)
    batch = Collator(data.tokenizer, 20)([data[0], data[1]])
    assert batch.pop("records") == ["read-8", "read-9"]
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(batch, (2, 20))
    assert "images" not in batch

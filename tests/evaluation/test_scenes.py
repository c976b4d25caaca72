"""Scenes, what is asked and said about them, and the test set that is shipped: all of it can be made again."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from playground.asking import TYPES, answers_of, caption, questions, sentences, training_questions
from playground.drawing import (
    COLORS,
    EDGE,
    GLYPHS,
    PATTERNS,
    SHAPES,
    TINTS,
    Scene,
    Thing,
    encode,
    render,
    sample_scene,
)
from playground.scenes import SPLITS, TEST_SET, main, make_test_set, rng_of

ROOT = Path(__file__).resolve().parents[2]
properties = settings(max_examples=60, deadline=None)
rngs = st.builds(rng_of, st.sampled_from(list(SPLITS)), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
kinds_of_scenes = st.sampled_from([(EDGE, (1, 5)), (72, (1, 3))])  # both that the embedded model is trained on


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "playground.scenes", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Records of a test set's file, with the image's bytes as ``image``."""
    return [{**row, "image": row["image"]["bytes"]} for row in pq.read_table(path).to_pylist()]


def boxes(scene: Scene) -> np.ndarray:
    """How many objects' squares are over each pixel, (edge, edge)."""
    number = np.zeros((scene.edge, scene.edge), int)
    for thing in scene.things:
        left, top = round(thing.x - thing.edge / 2), round(thing.y - thing.edge / 2)
        number[top : top + thing.edge, left : left + thing.edge] += 1
    return number


# The test set


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    return rows_of(TEST_SET)


def test_the_shipped_test_set_is_made_again_bit_for_bit(shipped: list[dict[str, Any]]):
    assert [dataclasses.asdict(record) for record in make_test_set()] == shipped
    assert TEST_SET.stat().st_size <= 4e6


def test_types_and_their_answers_are_equally_frequent(shipped: list[dict[str, Any]]):
    """So that always giving one answer is right as seldom as can be."""
    found = Counter((row["type"], row["answer"]) for row in shipped)
    assert found == {(type_, answer): 200 // len(answers_of(type_)) for type_ in TYPES for answer in answers_of(type_)}


def test_questions_share_images(shipped: list[dict[str, Any]]):
    """At most four about one image, each of another type; ids count from 0."""
    assert [row["question_id"] for row in shipped] == list(range(len(shipped)))
    assert sorted({row["image_id"] for row in shipped}) == list(range(shipped[-1]["image_id"] + 1))
    assert len({(row["image_id"], row["type"]) for row in shipped}) == len(shipped)
    assert Counter(row["image_id"] for row in shipped).most_common(1)[0][1] == 4
    images = {(row["image_id"], row["image"]) for row in shipped}
    assert len(images) == len(dict(images)) == len({image for _, image in images})
    assert {Image.open(io.BytesIO(row["image"])).size for row in shipped[::100]} == {(EDGE, EDGE)}


def test_the_picture_of_the_readme_is_of_the_test_set(shipped: list[dict[str, Any]]):
    assert (ROOT / "examples/scene.jpg").read_bytes() in {row["image"] for row in shipped}


def test_the_test_set_opens_as_images_in_datasets():
    """Which takes the columns' types from there."""
    features = json.loads(pq.read_schema(TEST_SET).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert list(features) == pq.read_schema(TEST_SET).names


# Scenes


def test_other_seeds_and_splits_are_other_scenes():
    """Training, validation and test share none, nor do two seeds."""
    sets = [(split, seed) for split in SPLITS for seed in (0, 1)]
    scenes = [sample_scene(rng_of(*key, index)) for key in sets for index in range(100)]
    assert len(set(scenes)) == len(scenes)
    assert scenes[:3] == [sample_scene(rng_of("train", 0, index)) for index in range(3)]


@given(rngs, kinds_of_scenes)
@properties
def test_objects_are_inside_and_apart_and_have_names_of_their_own(rng, kind):
    edge, number = kind
    scene = sample_scene(rng, edge, number)
    assert number[0] <= len(scene.things) <= number[1]
    assert len({thing.name for thing in scene.things}) == len(scene.things)
    covered = boxes(scene)
    assert covered.max() == 1
    assert covered.sum() == sum(thing.edge**2 for thing in scene.things)  # none is cut off
    assert all((thing.edge < 24) == (thing.size == "small") for thing in scene.things)


def test_most_patches_are_background():
    """That is what VisionZip can leave out: of the 12 x 12 patches few have anything of an object."""
    shares = []
    for index in range(200):
        patches = boxes(sample_scene(rng_of("test", 0, index))).reshape(12, 12, 12, 12)
        shares.append(patches.any(axis=(1, 3)).mean())
    assert max(shares) < 0.5
    assert np.mean(shares) < 0.2


def test_an_image_shows_its_scene():
    """Each object has its colour in its place, and the stored image is as large as the rendered one."""
    for index in range(30):
        rng = rng_of("validation", 3, index)
        scene = sample_scene(rng)
        pixels = render(scene, rng)
        near = np.zeros((EDGE, EDGE), bool)
        for thing in scene.things:
            left, top = round(thing.x - thing.edge / 2), round(thing.y - thing.edge / 2)
            square = np.s_[top : top + thing.edge, left : left + thing.edge]
            distance = np.abs(pixels[square] - 0.94 * np.array(COLORS[thing.color])).max(axis=-1)
            assert (distance < 50).mean() > 0.1, (index, thing)
            near[square] = True
        stored = np.asarray(Image.open(io.BytesIO(encode(pixels))))
        assert stored.shape == pixels.shape == (EDGE, EDGE, 3)
        assert np.abs(stored.astype(int) - pixels).mean() < 5
        assert pixels[near].std() > pixels[~near].std()  # objects stand out


# Questions and sentences


def right_answers(text: str, scene: Scene) -> list[str]:
    """All answers to a question, from the scene's description; one, if the question is a good one."""
    things = scene.things
    answers = []
    match text.rstrip("?").split():
        case ["Is", "there", article, color, kind]:
            assert article == ("an" if color[0] in "aeiou" else "a")
            answers = ["yes" if any((thing.color, thing.kind) == (color, kind) for thing in things) else "no"]
        case ["What", "color", "is", "the", kind]:
            answers = [thing.color for thing in things if thing.kind == kind]
        case ["Which", "shape", "is", color]:
            answers = [thing.kind for thing in things if thing.color == color and len(thing.kind) > 1]
        case ["Which", "letter", "or", "digit", "is", color]:
            answers = [thing.kind for thing in things if thing.color == color and len(thing.kind) == 1]
        case ["How", "many", "objects", "are", "there"]:
            answers = [str(len(things))]
        case ["Where", "is", "the", *name, "relative", "to", "the", color, kind]:
            (a,) = [thing for thing in things if [thing.color, thing.kind] == name]
            (b,) = [thing for thing in things if (thing.color, thing.kind) == (color, kind)]
            degrees = math.degrees(math.atan2(b.y - a.y, a.x - b.x))
            sides = {"right": 0, "above": 90, "left": 180, "below": 270}
            # 10 degrees beside a diagonal it would be hard to tell.
            answers = [side for side, middle in sides.items() if abs((degrees - middle + 180) % 360 - 180) < 35]
        case ["Where", "is", "the", color, kind]:
            answers = [place(thing, scene.edge) for thing in things if (thing.color, thing.kind) == (color, kind)]
        case ["What", ("pattern" | "tint") as what, "does", "the", "background", "have"]:
            answers = [getattr(scene, what)]
    return answers


def place(thing: Thing, edge: int) -> str:
    row = "top" if thing.y < edge / 3 else "middle" if thing.y < edge * 2 / 3 else "bottom"
    column = "left" if thing.x < edge / 3 else "center" if thing.x < edge * 2 / 3 else "right"
    return f"{row} {column}"


def is_true(sentence: str, scene: Scene) -> bool:
    """Whether ``a small red ring at the top left`` (or ``a striped gray background``) describes something there."""
    if found := re.fullmatch(r"an? (\w+) (\w+) background", sentence):
        assert found[1] in PATTERNS and found[2] in TINTS, sentence
        return found.groups() == (scene.pattern, scene.tint)
    found = re.fullmatch(r"a (small|large) (\w+) (\w+) at the (\w+ \w+)", sentence)
    assert found and found[2] in COLORS and found[3] in SHAPES + GLYPHS, sentence
    facts = [(thing.size, thing.color, thing.kind, place(thing, scene.edge)) for thing in scene.things]
    return found.groups() in facts


@given(rngs, kinds_of_scenes)
@properties
def test_every_answer_is_right(rng, kind):
    scene = sample_scene(rng, *kind)
    asked = questions(scene, rng)
    assert {"presence", "count", "background"} <= {question.type for question in asked} <= set(TYPES)
    learnt = training_questions(scene, rng, 8)
    assert len({question.text for question in learnt}) == len(learnt) <= 8
    for question in (*asked, *learnt):
        assert right_answers(question.text, scene) == [question.answer], question
        assert question.type == "location" or question.answer in answers_of(question.type)


@given(rngs, kinds_of_scenes)
@properties
def test_sentences_are_true_or_false_as_they_say(rng, kind):
    scene = sample_scene(rng, *kind)
    true, false = sentences(scene, rng)
    assert len(set(true)) == len(scene.things) + 1
    assert all(is_true(sentence, scene) for sentence in true)
    assert not any(is_true(sentence, scene) for sentence in false)
    objects, background = caption(scene, rng).removesuffix(".").split(" on ")
    assert sorted([*objects.split(", "), background]) == sorted(true)


# The command


def test_write_a_test_set(tmp_path: Path):
    """Of another seed; the first rows are not the shipped ones."""
    path = tmp_path / "new" / "seven.parquet"
    done = run("test", "--seed", "7", "--per-type", "40", "--output", str(path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(path)
    assert rows == [dataclasses.asdict(record) for record in make_test_set(seed=7, per_type=40)]
    assert done.stdout == f"{path}: 280 questions about {rows[-1]['image_id'] + 1} images\n"
    assert not {row["image"] for row in rows} & {row["image"] for row in rows_of(TEST_SET)}


def test_per_type_must_be_shared_equally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out = tmp_path / "test.parquet"
    monkeypatch.setattr(sys, "argv", ["playground.scenes", "test", "--per-type", "50", "--output", str(out)])
    assert main() == 2
    message = capsys.readouterr().err
    assert "per_type=50 is not a multiple of 40" in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_write_training_data(tmp_path: Path):
    """In LLaVA's format, with every image; the same again when it is run again."""
    flags = ["--images", "5", "--edge", "72", "--max-things", "3"]
    for folder in ("once", "again"):
        done = run("train", *flags, "--output", str(tmp_path / folder))
        assert done.returncode == 0, done.stderr
    once, again = (
        {path.relative_to(tmp_path / folder): path.read_bytes() for path in (tmp_path / folder).rglob("*.*")}
        for folder in ("once", "again")
    )
    assert once == again
    images = [f"{index:06d}.jpg" for index in range(5)]
    data = {name: json.loads(once.pop(Path(f"{name}.json"))) for name in ("tower", "pretrain", "instruct")}
    assert sorted(map(str, once)) == [f"images/{name}" for name in images]
    assert {Image.open(io.BytesIO(image)).size for image in once.values()} == {(72, 72)}

    for index, image in enumerate(images):
        scene = sample_scene(rng_of("train", 0, index), 72, (1, 3))
        tower, pretrain, instruct = (data[name][index] for name in data)
        assert tower["image"] == pretrain["image"] == instruct["image"] == image
        assert all(is_true(sentence, scene) for sentence in tower["captions"])
        assert not any(is_true(sentence, scene) for sentence in tower["negatives"])
        described = pretrain["conversations"][1]["value"]
        assert pretrain["conversations"] == [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": described},
        ]
        turns = instruct["conversations"]
        speakers, values = zip(*((turn["from"], turn["value"]) for turn in turns), strict=True)
        assert speakers == ("human", "gpt") * (len(values) // 2)
        asked = [values[0].removeprefix("<image>\n"), *values[2::2]]
        assert values[0] == f"<image>\n{asked[0]}"
        assert [right_answers(question, scene) for question in asked] == [[answer] for answer in values[1::2]]

"""Synthetic scenes and questions about them: what the embedded model learns from and is tested on.

A scene is a patterned background with a few coloured shapes, letters and digits on it, some of them barely larger than
one patch. Everything follows from (split, seed, index): the same numbers give the same pixels and words.

    … test                                    playground/data/eval/scenes/test.parquet
    … test --seed 7 --output seven.parquet    another test set
    … train --images 30000 --output DIR       training data, in LLaVA's format

(``python -m playground.scenes`` in front.)
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.commands.parsers import Commands, run_commands
from llava.commands.screen import track
from playground.asking import (
    TYPES,
    answers_of,
    caption,
    conversation,
    harder_sentences,
    questions,
    scene_facts,
    sentences,
    training_questions,
)
from playground.drawing import EDGE, MAX_THINGS, encode, render, sample_scene

SPLITS = {"train": 0, "validation": 1, "test": 2}
TEST_SET = Path(__file__).parent / "data/eval/scenes/test.parquet"


def rng_of(split: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one scene; splits never share any.

    Raises:
        KeyError: the split is none of SPLITS.
    """
    return np.random.default_rng([SPLITS[split], seed, index])


@dataclass(frozen=True)
class Record:
    """A question of a test set with its image, a JPEG file; questions about one image share ``image_id``."""

    question_id: int
    image_id: int
    image: bytes
    type: str
    question: str
    answer: str


def make_test_set(
    split: str = "test", seed: int = 0, per_type: int = 200, per_image: int = 4, edge: int = EDGE
) -> Iterator[Record]:
    """Questions with each type, and within a type each answer, equally often.

    Args:
        split: ``test`` or ``validation``.
        seed: other seeds give other sets of the same kind.
        per_type: questions of each type; a multiple of 40, which all numbers of answers divide.
        per_image: at most so many questions about one image, of different types.
        edge: of the images, in pixels.

    Raises:
        ValueError: ``per_type`` is no multiple of 40.
    """
    if per_type < 1 or per_type % 40:
        raise ValueError(f"per_type={per_type} is not a multiple of 40, which the answers of each type share equally")
    quota = {}
    for type_ in TYPES:
        answers = answers_of(type_)
        quota |= {(type_, answer): per_type // len(answers) for answer in answers}
    index = image_id = question_id = 0
    while any(quota.values()):
        rng = rng_of(split, seed, index)
        index += 1
        scene = sample_scene(rng, edge)
        wanted = {}
        for question in questions(scene, rng):
            if quota[question.type, question.answer]:
                wanted.setdefault(question.type, question)
        # Images that answer little are passed over while there is much to ask.
        if len(wanted) < min(per_image, sum(any(quota[t, a] for a in answers_of(t)) for t in TYPES)) and index % 50:
            continue
        if not wanted:
            continue
        # Types that lag behind come first.
        left = {t: sum(quota[t, a] for a in answers_of(t)) for t in wanted}
        chosen = sorted(wanted.values(), key=lambda question: -left[question.type])[:per_image]
        image = encode(render(scene, rng))
        for question in chosen:
            quota[question.type, question.answer] -= 1
            yield Record(question_id, image_id, image, question.type, question.text, question.answer)
            question_id += 1
        image_id += 1


def write_parquet(records: Sequence[Record], path: Path) -> None:
    """Write a test set in the form that ``datasets`` gives images in: ``image`` is {bytes, path}."""
    import pyarrow as pa  # noqa: PLC0415 - of the extra `eval`; drawing does without
    import pyarrow.parquet as pq  # noqa: PLC0415

    from llava.storage.files import write_atomically  # noqa: PLC0415 - with it comes torch, which drawing does without

    features = {
        name: {"dtype": kind, "_type": "Value"} for name, kind in (("question_id", "int32"), ("image_id", "int32"))
    }
    features |= {"image": {"_type": "Image"}}
    features |= {name: {"dtype": "string", "_type": "Value"} for name in ("type", "question", "answer")}
    table = pa.table(
        {
            "question_id": pa.array([record.question_id for record in records], pa.int32()),
            "image_id": pa.array([record.image_id for record in records], pa.int32()),
            # The same bytes for each question about an image: parquet's dictionary stores them once.
            "image": pa.array(
                [{"bytes": record.image, "path": f"{record.image_id}.jpg"} for record in records],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "type": [record.type for record in records],
            "question": [record.question for record in records],
            "answer": [record.answer for record in records],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    write_atomically(
        path, functools.partial(pq.write_table, table, compression="zstd", dictionary_pagesize_limit=64 << 20)
    )


def _training_record(split: str, seed: int, edge: int, things: tuple[int, int], folder: Path, index: int) -> dict:
    """Draw one image into the folder; what is said about it, by json file."""
    rng = rng_of(split, seed, index)
    scene = sample_scene(rng, edge, things)
    name = f"{index:06d}.jpg"
    (folder / name).write_bytes(encode(render(scene, rng)))
    true, false = sentences(scene, rng)
    described = caption(scene, rng)
    first = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": described}
    about = training_questions(scene, rng, 12)
    return {
        "tower": {"image": name, "captions": true, "negatives": false, "harder": harder_sentences(scene_facts(scene))},
        "pretrain": {"id": f"{split}_{index}", "image": name, "conversations": list(first)},
        "instruct": {"id": f"{split}_{index}", "image": name, "conversations": conversation(about)},
    }


def write_training_data(
    folder: Path,
    images: int,
    split: str = "train",
    seed: int = 0,
    edge: int = EDGE,
    things: tuple[int, int] = (1, MAX_THINGS),
) -> None:
    """Write images and three json files about them.

    ``tower.json`` has sentences for contrastive pretraining; ``pretrain.json`` (captions) and ``instruct.json``
    (questions) are in LLaVA's format.

    Raises:
        ValueError: there is nothing to draw, or no room for it.
    """
    if images < 1 or things[1] < 1:
        raise ValueError(f"images={images} and things={things[1]} must be at least 1")
    if (room := edge * edge // 1700) < things[1]:  # or drawing might never find a free place
        raise ValueError(f"things={things[1]} do not fit into edge={edge} pixels: use at most {room}, or more pixels")
    from llava.storage.files import write_atomically, writing  # noqa: PLC0415 - with it comes torch, which drawing does without

    images_folder = folder / "images"
    make = functools.partial(_training_record, split, seed, edge, things, images_folder)
    with writing(images_folder, "Images that are there stay, and are drawn again"), multiprocessing.Pool() as pool:
        images_folder.mkdir(parents=True, exist_ok=True)
        made = pool.imap(make, range(images), chunksize=64)
        records = list(track(made, images, f"scenes of {edge} px", "images"))
    for name in records[0]:
        write_atomically(folder / f"{name}.json", json.dumps([record[name] for record in records]))


def main() -> int:
    """The command: write a test set, or training data."""
    return run_commands("python -m playground.scenes", COMMANDS, sys.argv[1:], __doc__)


def _write_test(args: argparse.Namespace) -> None:
    """Write a test set, one parquet file."""
    records = list(make_test_set(seed=args.seed, per_type=args.per_type))
    write_parquet(records, args.output)
    print(f"{args.output}: {len(records)} questions about {records[-1].image_id + 1} images")


def _write_train(args: argparse.Namespace) -> None:
    """Write images and json files to train from."""
    write_training_data(args.output, args.images, args.split, args.seed, args.edge, (1, args.max_things))


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``test``."""
    parser.add_argument("--per-type", type=int, default=200, help="questions of each type, a multiple of 40")
    default = "playground/data/eval/scenes/test.parquet"
    parser.add_argument(
        "--output", "--out", type=Path, default=TEST_SET, metavar="FILE", help=f"file to write (default: {default})"
    )
    _add_seed_argument(parser)
    parser.set_defaults(run=_write_test)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``train``."""
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="what it is for")
    parser.add_argument("--images", type=int, required=True, help="how many")
    parser.add_argument("--edge", type=int, default=EDGE, help="of the images, in pixels")
    parser.add_argument("--max-things", type=int, default=MAX_THINGS, help="objects at most")
    parser.add_argument("--output", "--out", type=Path, required=True, metavar="FOLDER", help="folder to write into")
    _add_seed_argument(parser)
    parser.set_defaults(run=_write_train)


def _add_seed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes")


COMMANDS: Commands = {
    "test": (add_test_arguments, "a test set, one parquet file"),
    "train": (add_train_arguments, "images and json files to train from"),
}


if __name__ == "__main__":
    sys.exit(main())

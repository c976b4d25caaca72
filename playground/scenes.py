"""Synthetic scenes and questions about them: what the embedded model learns from and is tested on.

A scene is a patterned background with a few coloured shapes, letters and digits on it, some of them barely larger than
one patch. Everything follows from (split, seed, index): the same numbers give the same pixels and words.

    python -m playground.scenes test                      the test set, playground/data/eval/scenes/test.parquet
    python -m playground.scenes test --seed 7 --out seven.parquet    another one, of another seed
    python -m playground.scenes train --images 30000 --out DIR       training data, in LLaVA's format
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
from tqdm import tqdm

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

    from llava.files import write_atomically  # noqa: PLC0415 - with it comes torch, which drawing does without

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
    from llava.files import write_atomically, writing  # noqa: PLC0415 - with it comes torch, which drawing does without

    images_folder = folder / "images"
    make = functools.partial(_training_record, split, seed, edge, things, images_folder)
    with writing(images_folder, "Images that are there stay, and are drawn again"), multiprocessing.Pool() as pool:
        images_folder.mkdir(parents=True, exist_ok=True)
        made = pool.imap(make, range(images), chunksize=64)
        records = list(tqdm(made, desc=f"scenes {edge} px", total=images, unit="image"))
    for name in records[0]:
        write_atomically(folder / f"{name}.json", json.dumps([record[name] for record in records]))


def main() -> int:
    """The command: write a test set, or training data."""
    parser = argparse.ArgumentParser(
        "python -m playground.scenes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="a test set, one parquet file")
    test.add_argument("--per-type", type=int, default=200, help="questions of each type, a multiple of 40 (200)")
    test.add_argument("--out", type=Path, default=TEST_SET, help=f"file to write ({TEST_SET})")
    train = commands.add_parser("train", help="images and json files to train from")
    train.add_argument("--split", choices=("train", "validation"), default="train")
    train.add_argument("--images", type=int, required=True, help="how many")
    train.add_argument("--edge", type=int, default=EDGE, help=f"of the images, in pixels ({EDGE})")
    train.add_argument("--max-things", type=int, default=MAX_THINGS, help=f"objects at most ({MAX_THINGS})")
    train.add_argument("--out", type=Path, required=True, help="folder to write into")
    for command in (test, train):
        command.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (0)")
    args = parser.parse_args()
    try:
        if args.command == "test":
            records = list(make_test_set(seed=args.seed, per_type=args.per_type))
            write_parquet(records, args.out)
            print(f"{args.out}: {len(records)} questions about {records[-1].image_id + 1} images")
        else:
            things = (1, args.max_things)
            write_training_data(args.out, args.images, args.split, args.seed, args.edge, things)
    except (ValueError, OSError) as error:
        print(f"playground.scenes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

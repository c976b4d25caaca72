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
import io
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

EDGE = 144  # pixels; with patches of 12 it is a grid of 12 x 12
COLORS = {
    "red": (214, 40, 40),
    "orange": (244, 132, 20),
    "yellow": (250, 220, 50),
    "green": (40, 170, 60),
    "cyan": (60, 210, 225),
    "blue": (40, 70, 220),
    "purple": (160, 50, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
GLYPHS = ("A", "K", "L", "T", "U", "X", "2", "4", "7", "9")
KINDS = SHAPES + GLYPHS
SIZES = ("small", "large")
TINTS = {
    "gray": (110, 110, 110),
    "brown": (126, 92, 62),
    "olive": (96, 108, 62),
    "navy": (58, 72, 108),
    "plum": (104, 70, 100),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "bricked")
TYPES = ("presence", "color", "shape", "count", "reading", "position", "background")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SPLITS = {"train": 0, "validation": 1, "test": 2}
MAX_THINGS = 5
TEST_SET = Path(__file__).parent / "data/eval/scenes/test.parquet"

# Edge lengths in pixels, from and below; glyphs need more to be legible.
_EDGES = {"small": (14, 20), "large": (26, 37)}
_GLYPH_EDGES = {"small": (18, 23), "large": (26, 35)}


@dataclass(frozen=True)
class Thing:
    """An object: what it is, and the square that it fills (centre and edge, in pixels)."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    edge: int

    @property
    def name(self) -> str:
        """How questions call it; unique in its scene."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A scene's description; :func:`render` draws it."""

    tint: str
    pattern: str
    things: tuple[Thing, ...]
    edge: int


@dataclass(frozen=True)
class Question:
    """A question about one scene. ``type`` is one of TYPES, or ``"location"``, which only training asks."""

    type: str
    text: str
    answer: str


def rng_of(split: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one scene; splits never share any.

    Raises:
        KeyError: the split is none of SPLITS.
    """
    return np.random.default_rng([SPLITS[split], seed, index])


def sample_scene(rng: np.random.Generator, edge: int = EDGE, things: tuple[int, int] = (1, MAX_THINGS)) -> Scene:
    """A random scene with ``things[0]`` to ``things[1]`` objects that do not overlap; their names differ."""
    number = int(rng.integers(things[0], things[1] + 1))
    placed: list[Thing] = []
    while len(placed) < number:
        # Of the objects 40 % are glyphs, half are small.
        kind = str(rng.choice(GLYPHS) if rng.random() < 0.4 else rng.choice(SHAPES))
        color, size = str(rng.choice(list(COLORS))), str(rng.choice(SIZES))
        side = int(rng.integers(*(_GLYPH_EDGES if kind in GLYPHS else _EDGES)[size]))
        x, y = (float(value) for value in rng.uniform(side / 2 + 1, edge - side / 2 - 1, 2))
        thing = Thing(kind, color, size, x, y, side)
        if all(_apart(thing, other) and thing.name != other.name for other in placed):
            placed.append(thing)
    return Scene(str(rng.choice(list(TINTS))), str(rng.choice(PATTERNS)), tuple(placed), edge)


def _apart(a: Thing, b: Thing, gap: int = 3) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.edge + b.edge) / 2 + gap


@functools.cache
def _sprite(kind: str, edge: int) -> np.ndarray:
    """Opacity (edge, edge) of an object, drawn four times as large and averaged."""
    large = edge * 4
    image = Image.new("L", (large, large))
    draw = ImageDraw.Draw(image)
    last, third = large - 1, large // 3
    if kind == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif kind == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif kind == "triangle":
        draw.polygon(((0, last), (last, last), (large // 2, 0)), fill=255)
    elif kind == "cross":
        draw.rectangle((third, 0, large - third, last), fill=255)
        draw.rectangle((0, third, last, large - third), fill=255)
    elif kind == "ring":
        draw.ellipse((0, 0, last, last), fill=255)
        draw.ellipse((third * 3 // 4, third * 3 // 4, last - third * 3 // 4, last - third * 3 // 4), fill=0)
    else:
        font = ImageFont.load_default(large * 1.28)  # capitals of it are `large` pixels high
        draw.text((large / 2, last), kind, fill=255, font=font, anchor="ms", stroke_width=large // 40)
    return np.asarray(image.resize((edge, edge), Image.Resampling.BOX), dtype=np.float32) / 255


def _smooth(rng: np.random.Generator, cells: int, edge: int) -> np.ndarray:
    noise = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(noise).resize((edge, edge), Image.Resampling.BILINEAR))


def _texture(pattern: str, edge: int, rng: np.random.Generator) -> np.ndarray:
    """The pattern (edge, edge), between -1 and 1, at a random scale and offset."""
    y, x = np.mgrid[:edge, :edge].astype(np.float32)
    period = rng.uniform(9, 15)
    shift_x, shift_y = rng.uniform(0, period, 2)
    if pattern == "striped":
        angle = rng.uniform(0, np.pi)
        return np.sign(np.sin((x * np.cos(angle) + y * np.sin(angle) + shift_x) * (2 * np.pi / period)))
    u, v = (x + shift_x) % period - period / 2, (y + shift_y) % period - period / 2
    if pattern == "dotted":
        return np.where(u * u + v * v < (period * 0.26) ** 2, 1.0, -0.3)
    if pattern == "checked":
        return np.sign(np.sin((x + shift_x) * (np.pi / period)) * np.sin((y + shift_y) * (np.pi / period)))
    if pattern == "bricked":
        row = np.floor((y + shift_y) / period)
        joint = (x + shift_x + row * period) % (2 * period)
        return np.where((np.abs(v) > period / 2 - 1.2) | (joint < 1.6), 1.0, -0.25)
    return np.zeros((edge, edge), np.float32)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Pixels (edge, edge, 3) uint8: background with pattern and noise, faint strokes as clutter, the objects."""
    edge = scene.edge
    shade = 14 * _texture(scene.pattern, edge, rng) * rng.choice((-1, 1))
    shade = shade + 7 * _smooth(rng, 4, edge) + 5 * _smooth(rng, 12, edge)
    base = np.asarray(TINTS[scene.tint], np.float32) * rng.uniform(0.85, 1.2) + rng.normal(0, 4, 3)
    pixels = base + shade[..., None]
    clutter = Image.new("L", (edge, edge))
    draw = ImageDraw.Draw(clutter)
    for _ in range(int(rng.integers(0, edge // 18))):
        x, y = rng.uniform(0, edge, 2)
        dx, dy = rng.normal(0, 7, 2)
        draw.line((x, y, x + dx, y + dy), fill=int(rng.integers(60, 140)), width=int(rng.integers(1, 4)))
    pixels += np.asarray(clutter, np.float32)[..., None] * rng.choice((-0.3, 0.3))
    for thing in scene.things:
        color = np.asarray(COLORS[thing.color], np.float32) * rng.uniform(0.88, 1.0) + rng.normal(0, 6, 3)
        left, top = round(thing.x - thing.edge / 2), round(thing.y - thing.edge / 2)
        square = pixels[top : top + thing.edge, left : left + thing.edge]
        alpha = _sprite(thing.kind, thing.edge)[..., None]
        square += alpha * (color - square)
    pixels += rng.normal(0, 3, (edge, edge, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    """An image file (JPEG) of the pixels, as all stored images of this data are."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def cell(thing: Thing, edge: int) -> tuple[str, str]:
    """The ninth of the image that holds the object's centre: row and column."""
    return ROWS[int(thing.y * 3 / edge)], COLUMNS[int(thing.x * 3 / edge)]


def with_article(noun: str) -> str:
    """``a red ring``, ``an orange ring``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence that names every object, in random order, and the background."""
    clauses = []
    for index in rng.permutation(len(scene.things)):
        thing = scene.things[index]
        row, column = cell(thing, scene.edge)
        clauses.append(f"{with_article(f'{thing.size} {thing.name}')} at the {row} {column}")
    return f"{', '.join(clauses)} on {with_article(f'{scene.pattern} {scene.tint} background')}."


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of every type that the scene allows, one per type (two about the background), in random order."""
    asked = [
        _presence(scene, rng),
        _attribute(scene, rng, "color"),
        _attribute(scene, rng, "shape"),
        Question("count", "How many objects are there?", str(len(scene.things))),
        _attribute(scene, rng, "reading"),
        _position(scene, rng),
        Question("background", "What pattern does the background have?", scene.pattern),
        Question("background", "What tint does the background have?", scene.tint),
    ]
    found = [question for question in asked if question is not None]
    return [found[index] for index in rng.permutation(len(found))]


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    names = {thing.name for thing in scene.things}
    if rng.random() < 0.5:
        name, answer = str(rng.choice(sorted(names))), "yes"
    else:
        # One word differs from an object that is there, so that neither colour nor shape alone decides.
        thing, answer = scene.things[rng.integers(len(scene.things))], "no"
        while True:
            if rng.random() < 0.5:
                name = f"{rng.choice(list(COLORS))} {thing.kind}"
            else:
                name = f"{thing.color} {rng.choice(SHAPES if thing.kind in SHAPES else GLYPHS)}"
            if name not in names:
                break
    return Question("presence", f"Is there {with_article(name)}?", answer)


def _attribute(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """What a thing has that the question does not say; only of things that the question names uniquely."""
    if kind == "color":
        number = Counter(thing.kind for thing in scene.things)
        fit = [thing for thing in scene.things if number[thing.kind] == 1]
    else:
        family = SHAPES if kind == "shape" else GLYPHS
        number = Counter(thing.color for thing in scene.things if thing.kind in family)
        fit = [thing for thing in scene.things if thing.kind in family and number[thing.color] == 1]
    if not fit:
        return None
    thing = fit[rng.integers(len(fit))]
    if kind == "color":
        return Question(kind, f"What color is the {thing.kind}?", thing.color)
    noun = "shape" if kind == "shape" else "letter or digit"
    return Question(kind, f"Which {noun} is {thing.color}?", thing.kind)


def _position(scene: Scene, rng: np.random.Generator) -> Question | None:
    pairs = []
    for a in scene.things:
        for b in scene.things:
            dx, dy = abs(a.x - b.x), abs(a.y - b.y)
            if a is not b and max(dx, dy) > scene.edge / 6 and max(dx, dy) > 1.5 * min(dx, dy):
                pairs.append((a, b))
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    if abs(a.x - b.x) > abs(a.y - b.y):
        answer = "left" if a.x < b.x else "right"
    else:
        answer = "above" if a.y < b.y else "below"
    return Question("position", f"Where is the {a.name} relative to the {b.name}?", answer)


def answers_of(type_: str) -> tuple[str, ...]:
    """All answers that questions of a type have; the test set has each of them equally often."""
    return {
        "presence": ("yes", "no"),
        "color": tuple(COLORS),
        "shape": SHAPES,
        "count": tuple(str(number) for number in range(1, MAX_THINGS + 1)),
        "reading": GLYPHS,
        "position": ("left", "right", "above", "below"),
        "background": PATTERNS + tuple(TINTS),
    }[type_]


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

    path.parent.mkdir(parents=True, exist_ok=True)
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
    unfinished = path.with_name(path.name + ".partial")
    pq.write_table(table, unfinished, compression="zstd", dictionary_pagesize_limit=64 << 20)
    unfinished.replace(path)


def scene_facts(scene: Scene) -> list[tuple[str, str, str, str, str]]:
    """Size, colour, kind, row and column of each object."""
    return [(thing.size, thing.color, thing.kind, *cell(thing, scene.edge)) for thing in scene.things]


def sentences(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """What is true of a scene, one sentence for each object and the background; and what is not, by one word."""
    facts = scene_facts(scene)
    false = []
    for fact in facts:
        for _ in range(2):
            part = rng.choice(5, p=(0.15, 0.3, 0.35, 0.1, 0.1))
            word = str(rng.choice((SIZES, tuple(COLORS), KINDS, ROWS, COLUMNS)[part]))
            changed = (*fact[:part], word, *fact[part + 1 :])
            if changed not in facts:
                false.append(_sentence(*changed))
    pattern, tint = str(rng.choice(PATTERNS)), str(rng.choice(list(TINTS)))
    changed = (pattern, scene.tint) if rng.random() < 0.5 else (scene.pattern, tint)
    if changed != (scene.pattern, scene.tint):
        false.append(f"{with_article(' '.join(changed))} background")
    true = [_sentence(*fact) for fact in facts]
    return [*true, f"{with_article(scene.pattern)} {scene.tint} background"], false


def harder_sentences(facts: Sequence[tuple[str, str, str, str, str]]) -> list[str]:
    """Everything false that differs from something true by the kind or the colour: all the alternatives.

    Args:
        facts: size, colour, kind, row and column of each object.
    """
    changed = [
        (*fact[:part], word, *fact[part + 1 :])
        for fact in facts
        for part, words in ((1, tuple(COLORS)), (2, KINDS))
        for word in words
    ]
    return [_sentence(*fact) for fact in dict.fromkeys(changed) if fact not in facts]


def _sentence(size: str, color: str, kind: str, row: str, column: str) -> str:
    return f"{with_article(size)} {color} {kind} at the {row} {column}"


def training_questions(scene: Scene, rng: np.random.Generator, turns: int) -> list[Question]:
    """At most ``turns`` different questions for training; what needs a look at single objects is asked most often."""
    asked = questions(scene, rng)
    for _ in range(3):
        thing = scene.things[rng.integers(len(scene.things))]
        asked.append(Question("location", f"Where is the {thing.name}?", " ".join(cell(thing, scene.edge))))
        asked += [_presence(scene, rng), *(_attribute(scene, rng, type_) for type_ in ("color", "shape", "reading"))]
        asked += [_position(scene, rng) for _ in range(2)]
    different = list({question.text: question for question in asked if question is not None}.values())
    return [different[index] for index in rng.permutation(len(different))[:turns]]


def conversation(asked: Sequence[Question]) -> list[dict[str, str]]:
    """Questions about an image and their answers, as the turns of LLaVA's format."""
    turns = []
    for number, question in enumerate(asked):
        turns.append({"from": "human", "value": question.text if number else f"<image>\n{question.text}"})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


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
    (folder / "images").mkdir(parents=True, exist_ok=True)
    make = functools.partial(_training_record, split, seed, edge, things, folder / "images")
    with multiprocessing.Pool() as pool:
        made = pool.imap(make, range(images), chunksize=64)
        records = list(tqdm(made, desc=f"scenes {edge} px", total=images, unit="image"))
    for name in records[0]:
        unfinished = folder / f"{name}.json.partial"
        unfinished.write_text(json.dumps([record[name] for record in records]))
        unfinished.replace(folder / f"{name}.json")


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

"""What can be said and asked about a scene: questions with their answers, captions, sentences true and false."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from playground.drawing import COLORS, GLYPHS, KINDS, MAX_THINGS, PATTERNS, SHAPES, SIZES, TINTS, Scene, Thing

TYPES = ("presence", "color", "shape", "count", "reading", "position", "background")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@dataclass(frozen=True)
class Question:
    """A question about one scene. ``type`` is one of TYPES, or ``"location"``, which only training asks."""

    type: str
    text: str
    answer: str


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

"""Synthetic scenes: what is in one, and its pixels.

A scene is a patterned background with a few coloured shapes, letters and digits on it, some of them barely larger than
one patch.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
MAX_THINGS = 5
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

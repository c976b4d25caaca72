"""Families such as Qwen-VL, which choose among the tokens that the model's own encoder returns ("the seam").

The encoder runs unchanged to its end, with its merger or pooling, so that a token of the language model stands for
several patches. Scores and keys are read in one attention layer of the encoder and averaged over the patches of each
token. So tokens of the language model are chosen and merged, and not patches. A method that reads projected patches or
hidden states gets these tokens for both. Kept tokens stay in raster order.

A family is one entry of :mod:`visionzip.integrations.seam.families`. With multimodal rotary positions
(``get_rope_index``) a kept token always has the (time, row, column) of the patch that it keeps, and text has its
position in the uncompressed prompt. Other families have consecutive positions unless ``positions="original"``.

The frames of a video are compressed one by one, whether they share a run of placeholders or have a run each, between
timestamps. With ``video_keep`` tokens are chosen among those of all frames, as if these were one tall picture, and a
frame may keep none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionzip.config import VisionZipConfig
from visionzip.encoder import reads_of
from visionzip.integrations.huggingface import Arguments, Encoded, Family, Modality, check_attributes, stock_features
from visionzip.integrations.prompts.held import Held
from visionzip.integrations.prompts.runs import Run
from visionzip.integrations.seam.choice import (
    Size,
    choose_in_frames,
    flat_tokens,
    is_whole,
    real_pixels,
    settings_of,
)
from visionzip.methods import check_setting, has_size_bias, token_counts


class Frames(NamedTuple):
    """How many frames a video has, and how many tokens each; an image is one frame."""

    number: int
    size: Size


Framing = Callable[[nn.Module, Arguments], list[Frames]]
"""``(base, arguments)`` to the :class:`Frames` of each image or video, from shapes and grids alone."""
Scored = Callable[[], tuple[Tensor, Tensor]]
"""Returns the scores (n,) and keys (n, Dk) of all tokens, frame after frame, once the encoder has run."""


@dataclass(frozen=True)
class Encoder:
    """How one kind of encoder is read.

    Attributes:
        read: ``(base, layer, arguments)`` to a context manager, inside which the encoder runs; it yields a
            :data:`Scored`.
        layers: ``(base)`` to the layers whose attention compares all patches of an image, in ascending order.
        pixels: ``(base, arguments, name)`` to the pixels in the argument of that name, without padding: those of all
            frames one after the other, or a list of them.
        pairs: as ``read``, of one picture, but what is yielded returns what each token pays to each: see
            :func:`visionzip.integrations.seam.maps.token_pairs`. None if that cannot be read.
    """

    read: Callable[[nn.Module, int, Arguments], AbstractContextManager[Scored]]
    layers: Callable[[nn.Module], list[int]]
    pixels: Callable[[nn.Module, Arguments, str], Tensor | list[Tensor]] = lambda base, arguments, name: real_pixels(
        arguments[name]
    )
    pairs: Callable[[nn.Module, int, Arguments], AbstractContextManager[Callable[[], Tensor]]] | None = None


@dataclass(frozen=True)
class OutputFamily(Family):
    """A family that chooses among the output of the model's own encoder; it may have M-RoPE's positions."""

    def has_original_positions(self, config: VisionZipConfig) -> bool:
        """Say whether kept tokens keep their positions: by the setting, and always with M-RoPE."""
        return self.rotary or super().has_original_positions(config)

    def positions(self, base: nn.Module, arguments: Arguments) -> Tensor | None:
        """Compute the positions (3, B, L) of the uncompressed prompts as the model does with M-RoPE."""
        if not self.rotary:
            return None
        ids, types = arguments["input_ids"], arguments.get("mm_token_type_ids")
        if types is None:
            names = enumerate(self.modalities, start=1)
            types = sum((ids == getattr(base.config, f"{name}_token_id")).int() * kind for kind, name in names)
        given = {name: arguments.get(name) for name in inspect.signature(base.get_rope_index).parameters}
        given.pop("kwargs", None)
        return base.get_rope_index(**given | {"mm_token_type_ids": types})[0]

    def with_axes(self, positions: Tensor) -> Tensor:
        """Repeat positions (B, L) of text on all axes of M-RoPE."""
        return positions.expand(3, -1, -1) if self.rotary else positions

    def note(self, base: nn.Module, held: Held, arguments: Arguments) -> None:
        """Set ``rope_deltas``, from which the model counts on in calls that give it no positions."""
        if self.rotary and held.after is not None:
            tokens = arguments["attention_mask"].sum(dim=1, keepdim=True)
            base.rope_deltas = held.after[:, -1:].to(tokens.device) - tokens


@dataclass(frozen=True, kw_only=True)
class SeamFamily(OutputFamily):
    """A family of which we know how its encoder can be read.

    Attributes:
        encoder: how the encoder is read.
        frames: how many images there are, and of which size.
        backbone: the attribute of the base model that holds the language model.
        side: ``(base)`` to the tokens along one edge of a picture, if all pictures have one size.
    """

    encoder: Encoder
    frames: Framing
    backbone: str = "language_model"
    side: Callable[[nn.Module], int] | None = None

    def check(self, model: nn.Module, config: VisionZipConfig) -> None:
        """Check the model and the setting as :meth:`Family.check` does, and that the scored layer sees all patches."""
        super().check(model, config)
        if self.rotary:
            check_attributes(model.model, ("get_rope_index",))
            if config.positions == "consecutive":
                raise ValueError(
                    f"positions='consecutive' does not fit {type(model).__name__}, whose tokens have a row and a "
                    "column: leave it out"
                )
        layers = self.encoder.layers(model.model)
        if config.layer not in layers:
            raise ValueError(
                f"layer={config.layer} of this {type(model).__name__}'s encoder does not compare all patches of an "
                f"image with each other: use one of {', '.join(map(str, layers))}, or leave it out"
            )
        check_setting(config, model, 64, lays_out_patches=True, whole_videos="video" in self.modalities)

    def default_config(self, model: nn.Module) -> VisionZipConfig:
        """Return the family's default: half of each image's tokens, scored in the last layer that can be read."""
        return VisionZipConfig(keep=0.5, layer=self.encoder.layers(model.model)[-1])

    def language_model(self, model: nn.Module) -> nn.Module:
        """Return the text backbone."""
        return getattr(model.model, self.backbone)

    def image_tokens(self, model: nn.Module) -> int | None:
        """Count the tokens of a picture if all pictures have one size; otherwise return None."""
        return None if self.side is None else self.side(model.model) ** 2


class _Kind(NamedTuple):
    """The arguments of :func:`modality`, which explains them."""

    name: str
    pixels: str
    frames: Framing
    encoder: Encoder
    apart: bool
    row_ends: bool

    def setting(self, config: VisionZipConfig) -> tuple[VisionZipConfig, bool]:
        """Return the setting for these images or videos, and whether a video's tokens are chosen as a whole."""
        whole = self.name == "video" and config.video_keep is not None
        return (config.of_videos() if whole else config), whole


def modality(
    name: str,
    pixels: str,
    frames: Framing,
    encoder: Encoder,
    apart: bool = False,
    row_ends: bool = False,
    **options: Any,
) -> Modality:
    """Define the images or videos of a family.

    Args:
        name: ``"image"`` or ``"video"``.
        pixels: the argument that has their pixels.
        frames: how many frames of which size there are.
        encoder: how the encoder is read.
        apart: whether each frame has a run of placeholders of its own, with text between them.
        row_ends: whether each row of placeholders ends with a token of its own, which stays (see :class:`Run`).
        **options: other attributes of :class:`Modality`.
    """
    kind = _Kind(name, pixels, frames, encoder, apart, row_ends)
    return Modality(pixels, partial(_runs, kind), partial(_encode, kind), **options)


def all_layers(blocks: str, base: nn.Module) -> list[int]:
    """List all layers of an encoder, counted from the end.

    Args:
        blocks: the dotted name of the base model's attribute that holds the layers.
        base: the base model.
    """
    depth = len(attrgetter(blocks)(base))
    return list(range(-depth, 0))


def _pieces(frames: Frames, whole: bool) -> list[Size]:
    """List the sizes among whose tokens is chosen: each frame's, or that of a video's frames on top of each other."""
    count, (rows, columns) = frames
    return [(count * rows, columns)] if whole else [(rows, columns)] * count


def _runs(kind: _Kind, base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> list[Run]:
    runs: list[Run] = []
    own, whole = kind.setting(config)
    seen = kind.frames(base, arguments)
    settings = iter(settings_of(own, sum(len(_pieces(frames, whole)) for frames in seen)))
    for frames in seen:
        count, (rows, columns) = frames
        shorts = [token_counts(next(settings), y * x, False).total for y, x in _pieces(frames, whole)]
        short = sum(shorts)
        if kind.apart and len({*shorts}) > 1:
            raise ValueError(f"{min(shorts)} to {max(shorts)} patches are picked of frames: choose as many of each")
        if kind.apart:
            runs += [Run(rows * columns, None if whole else short // count)] * count
        elif kind.row_ends:
            runs.append(Run(rows * (columns + 1), short + rows, columns))
        else:
            runs.append(Run(count * rows * columns, short))
    return runs


def _encode(kind: _Kind, base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> Encoded:
    names = inspect.signature(getattr(type(base), f"get_{kind.name}_features")).parameters
    taken = {key: arguments[key] for key in names if arguments.get(key) is not None}
    seen, (own, whole) = kind.frames(base, arguments), kind.setting(config)
    sizes = [size for frames in seen for size in _pieces(frames, whole)]
    settings = settings_of(own, len(sizes))
    reads = frozenset().union(*map(reads_of, settings))
    scored = reads & {"scores", "keys"} and not all(map(is_whole, settings, sizes))
    with kind.encoder.read(base, own.layer, arguments) if scored else nullcontext() as read:
        output = stock_features(base, kind.name, taken | {"return_dict": True})
    scores, keys = (None, None) if read is None else read()
    layers = [flat_tokens(output.pooler_output), *map(flat_tokens, getattr(output, "deepstack_features", None) or ())]
    pixels = kind.encoder.pixels(base, arguments, kind.pixels)
    chosen = choose_in_frames(layers, sizes, scores, keys, pixels, settings)
    counts = [1 if whole else frames.number for frames in seen]
    tokens = [rows * columns for _, (rows, columns) in seen]
    starts = [at * size for count, size in zip(counts, tokens, strict=True) for at in range(count)]
    places = _joined([own + start for own, start in zip(chosen.places, starts, strict=True)], counts)
    groups = _joined(chosen.sizes, counts) if has_size_bias(own) else None
    found = Encoded(_joined(chosen.layers[0], counts), places, groups, output.last_hidden_state)
    if len(layers) > 1:
        found = found._replace(deepstack=[_joined(layer, counts) for layer in chosen.layers[1:]])
    if kind.apart:
        return _by_frame(found, seen, whole)
    return _with_row_ends(found, seen) if kind.row_ends else found


def _by_frame(encoded: Encoded, seen: list[Frames], whole: bool) -> Encoded:
    """Split the tokens of videos into those of each frame, which has a run of its own."""
    lengths: list[list[int]] = []
    places: list[Tensor] = []
    for (count, (rows, columns)), own in zip(seen, encoded.places, strict=True):
        frame = own // (rows * columns)
        lengths.append(frame.bincount(minlength=count).tolist() if whole else [len(own) // count] * count)
        places += (own % (rows * columns)).split(lengths[-1])

    def split(videos: list[Tensor]) -> list[Tensor]:
        return [part for own, parts in zip(videos, lengths, strict=True) for part in own.split(parts)]

    deepstack = encoded.deepstack and [split(layer) for layer in encoded.deepstack]
    return encoded._replace(
        tokens=split(encoded.tokens),
        places=places,
        sizes=encoded.sizes and split(encoded.sizes),
        deepstack=deepstack,
    )


def _with_row_ends(encoded: Encoded, seen: list[Frames]) -> Encoded:
    """Add the places and sizes of the tokens that end each row."""
    places, sizes = [], []
    for at, (own, (_, (rows, columns))) in enumerate(zip(encoded.places, seen, strict=True)):
        ends = torch.arange(columns, rows * (columns + 1), columns + 1, device=own.device)
        found, order = torch.cat([own + own // columns, ends]).sort()
        places.append(found)
        if encoded.sizes:
            sizes.append(torch.cat([encoded.sizes[at], torch.ones_like(ends, dtype=torch.float32)])[order])
    return encoded._replace(places=places, sizes=sizes or None)


def _joined(frames: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Join the values of frames to those of each image or video."""
    values = iter(frames)
    return [torch.cat([next(values) for _ in range(count)]) for count in counts]

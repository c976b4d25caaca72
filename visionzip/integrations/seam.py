"""Today's families of transformers, Qwen-VL first: tokens are chosen among what the model's own encoder returns.

The encoder runs as it is, to its end, and its merger or pooling too: a token of the language model is one of several
patches. Scores and keys come from one attention layer of the encoder and are averaged over the patches of each token,
so that everything is chosen and merged at the language model's own grain. Kept tokens stay in raster order. Where a
method reads projected patches, and where it reads hidden states, it gets these tokens.

A family here is one entry of :mod:`visionzip.integrations.seam_families`. With multimodal rotary positions
(``get_rope_index``) a kept token has the (time, row, column) of the patch that it keeps, and text keeps its place,
always; other families have consecutive positions unless ``positions="original"``.

Frames of a video are compressed one by one, whether they share a run of placeholders or have one each, between
timestamps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionzip.compress import CompressedTokens, compress_alike
from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens
from visionzip.integrations.held import Held
from visionzip.integrations.huggingface import Arguments, Encoded, Family, Modality, check_attributes, stock_features
from visionzip.integrations.placeholders import Run
from visionzip.methods import EncoderRead, check_setting, has_size_bias, method_of, token_counts

Size = tuple[int, int]
"""Rows and columns of a frame's tokens."""


class Frames(NamedTuple):
    """Frames that share one run of placeholders: an image is one."""

    count: int
    size: Size


Framing = Callable[[nn.Module, Arguments], list[Frames]]
"""``(base, arguments)`` to the frames of each run of placeholders, from shapes and grids alone."""
Scored = Callable[[], tuple[Tensor | None, Tensor | None]]
"""What was read, once the encoder has run: a score (n,) and a key (n, Dk) of each token, frame after frame."""


@dataclass(frozen=True)
class Encoder:
    """How one kind of encoder is read.

    Attributes:
        read: ``(base, layer, arguments)`` to a context manager that yields :data:`Scored`.
        layers: ``(base)`` to the layers that compare all of an image's patches, the last one at the end.
    """

    read: Callable[[nn.Module, int, Arguments], AbstractContextManager[Scored]]
    layers: Callable[[nn.Module], list[int]]


@dataclass(frozen=True)
class SeamFamily(Family):
    """A family of transformers whose model takes ``mm_encoder_outputs``.

    Attributes:
        encoder: how its encoder is read.
        backbone: attribute of the base model that has the language model.
        frames: how images make up runs of placeholders.
        side: ``(base)`` to the tokens along the edge of a picture, where all pictures have one size.
    """

    encoder: Encoder | None = None
    backbone: str = "language_model"
    frames: Framing | None = None
    side: Callable[[nn.Module], int] | None = None

    def check(self, model: nn.Module, config: VisionZipConfig) -> None:
        """As :meth:`Family.check` says; also that the scored layer compares all of an image's patches."""
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
        check_setting(config, model, 64, lays_out_patches=True)

    def default_config(self, model: nn.Module) -> VisionZipConfig:
        """Half of each image's tokens, by the last encoder layer that can be read."""
        return VisionZipConfig(keep=0.5, layer=self.encoder.layers(model.model)[-1])

    def has_original_positions(self, config: VisionZipConfig) -> bool:
        """Always with M-RoPE."""
        return self.rotary or super().has_original_positions(config)

    def positions(self, base: nn.Module, arguments: Arguments) -> Tensor | None:
        """The model's own three axes (3, B, L), of the prompts as they are."""
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
        """Text is at the same place on all axes."""
        return positions.expand(3, -1, -1) if self.rotary else positions

    def language_model(self, model: nn.Module) -> nn.Module:
        """The text backbone."""
        return getattr(model.model, self.backbone)

    def image_tokens(self, model: nn.Module) -> int | None:
        """A square of them where all pictures have one size."""
        return None if self.side is None else self.side(model.model) ** 2

    def note(self, base: nn.Module, held: Held, arguments: Arguments) -> None:
        """``rope_deltas``, with which the model counts on where it is given no positions."""
        if self.rotary and held.after is not None:
            tokens = arguments["attention_mask"].sum(dim=1, keepdim=True)
            base.rope_deltas = held.after[:, -1:].to(tokens.device) - tokens


def modality(name: str, pixels: str, frames: Framing, encoder: Encoder, **options: Any) -> Modality:
    """Images or videos of a family.

    Args:
        name: ``"image"`` or ``"video"``.
        pixels: the argument that has them.
        frames: how they make up runs of placeholders.
        encoder: how it is read.
        **options: others of :class:`Modality`.
    """
    return Modality(pixels, partial(_runs, frames), partial(_encode, name, pixels, frames, encoder), **options)


def _runs(frames: Framing, base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> list[Run]:
    runs = []
    for count, (rows, columns) in frames(base, arguments):
        full = rows * columns
        runs.append(Run(count * full, count * token_counts(config, full, False).total))
    return runs


def _encode(
    name: str,
    pixels: str,
    frames: Framing,
    encoder: Encoder,
    base: nn.Module,
    config: VisionZipConfig,
    arguments: Arguments,
) -> Encoded:
    names = inspect.signature(getattr(type(base), f"get_{name}_features")).parameters
    taken = {key: arguments[key] for key in names if arguments.get(key) is not None}
    runs = frames(base, arguments)
    counts, sizes = [count for count, _ in runs], [size for count, size in runs for _ in range(count)]
    reads = method_of(config).reads | ({"keys"} if has_size_bias(config) else set())
    scored = reads & {"scores", "keys"} and not all(_is_whole(config, size) for size in sizes)
    with encoder.read(base, config.layer, arguments) if scored else nullcontext(_nothing) as read:
        output = stock_features(base, name, taken | {"return_dict": True})
    layers = [flat_tokens(output.pooler_output), *map(flat_tokens, getattr(output, "deepstack_features", None) or ())]
    chosen = choose_in_frames(layers, sizes, *read(), real_pixels(arguments[pixels]), config)
    tokens, *deepstack = [_by_run(layer, counts) for layer in chosen.layers]
    numbers = [frame for count in counts for frame in range(count)]
    starts = [frame * rows * columns for frame, (rows, columns) in zip(numbers, sizes, strict=True)]
    places = _by_run([own + start for own, start in zip(chosen.places, starts, strict=True)], counts)
    groups = _by_run(chosen.sizes, counts) if has_size_bias(config) else None
    return Encoded(tokens, places, groups, output.last_hidden_state, deepstack or None)


def _nothing() -> tuple[None, None]:
    return None, None


def _is_whole(config: VisionZipConfig, size: Size) -> bool:
    """Whether all tokens of a frame are kept."""
    return token_counts(config, size[0] * size[1], False).total == size[0] * size[1]


def real_pixels(pixels: Tensor) -> Tensor:
    """Pixels of all frames, one behind the other: Idefics has them by prompt, with black ones that fill up."""
    if pixels.ndim < 5:
        return pixels
    return pixels.flatten(0, 1)[shown(pixels).flatten()]


def shown(pixels: Tensor) -> Tensor:
    """(B, n) bool: which of the images of each prompt (B, n, 3, h, w) are not there only to fill up."""
    return (pixels != 0).flatten(2).any(dim=-1)


def flat_tokens(features: Any) -> Tensor:
    """All tokens (n, D) of all frames, in whatever form the model returns them."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat(list(features))


def _by_run(frames: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Values of frames, joined to those of each run."""
    values = iter(frames)
    return [torch.cat([next(values) for _ in range(count)]) for count in counts]


class _Chosen(NamedTuple):
    """Of each frame: its tokens in each layer, the places of these, and how many each stands for."""

    layers: list[list[Tensor]]
    places: list[Tensor]
    sizes: list[Tensor]


def choose_in_frames(
    layers: list[Tensor],
    sizes: list[Size],
    scores: Tensor | None,
    keys: Tensor | None,
    pixels: Tensor,
    config: VisionZipConfig,
) -> _Chosen:
    """Choose among the tokens of each frame; frames of one size are one batch.

    Args:
        layers: (n, D) tokens of all frames in order, for the language model's input and its layers that get some.
        sizes: of the frames.
        scores: (n,) of the tokens, if the method reads them.
        keys: (n, Dk) of the tokens, likewise.
        pixels: of all frames, one behind the other.
        config: the setting.
    """
    lengths = [rows * columns for rows, columns in sizes]
    per_token = len(pixels) // sum(lengths) if pixels.ndim == 2 else 0
    frames = pixels.split([length * per_token for length in lengths]) if per_token else pixels

    def batch(values: Tensor | None, which: list[int]) -> Tensor | None:
        if values is None:
            return None
        split = values.split(lengths)
        return torch.stack([split[frame] for frame in which])

    found = _Chosen([[None] * len(sizes) for _ in layers], [None] * len(sizes), [None] * len(sizes))
    for size in dict.fromkeys(sizes):
        which = [frame for frame, own in enumerate(sizes) if own == size]
        tokens = [batch(layer, which) for layer in layers]
        kept = torch.arange(size[0] * size[1], device=tokens[0].device).expand(len(which), -1)
        group = torch.ones_like(kept, dtype=torch.float32)
        if not _is_whole(config, size):
            read = EncoderRead(
                tokens[0],
                False,
                scores=batch(scores, which),
                keys=batch(keys, which),
                projected=tokens[0],
                pixels=torch.stack([frames[frame] for frame in which]),
                grid=size,
            )
            tokens, kept, group = _in_raster_order(tokens, choose_tokens(read, config), config)
        for at, frame in enumerate(which):
            for layer, own in zip(found.layers, tokens, strict=True):
                layer[frame] = own[at]
            found.places[frame], found.sizes[frame] = kept[at], group[at]
    return found


def _in_raster_order(
    layers: list[Tensor], chosen: CompressedTokens, config: VisionZipConfig
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Chosen tokens (B, T, D) of each layer, what they keep (B, T) and their sizes, ascending by what they keep."""
    kept, order = chosen.kept.sort(dim=1, stable=True)

    def ordered(values: Tensor) -> Tensor:
        return values.gather(1, order.view(*order.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))

    others = [compress_alike(layer, chosen, config.merge) for layer in layers[1:]]
    sizes = torch.ones_like(kept, dtype=torch.float32) if chosen.sizes is None else ordered(chosen.sizes)
    return [ordered(chosen.tokens), *map(ordered, others)], kept, sizes

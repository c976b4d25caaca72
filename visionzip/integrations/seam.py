"""Today's families of transformers, Qwen-VL first: tokens are chosen among what the model's own encoder returns.

The encoder runs as it is, to its end, and its merger or pooling too: a token of the language model is one of several
patches. Scores and keys come from one attention layer of the encoder and are averaged over the patches of each token,
so that everything is chosen and merged at the language model's own grain. Kept tokens stay in raster order. Where a
method reads projected patches, and where it reads hidden states, it gets these tokens.

A family here is one entry of the table at the end: how its encoder is read, and how many tokens each run of
placeholders has. With multimodal rotary positions (``get_rope_index``) a kept token has the
(time, row, column) of the patch that it keeps, and text keeps its place, always; other families have consecutive
positions unless ``positions="original"``.

Frames of a video are compressed one by one, whether they share a run of placeholders or have one each, between
timestamps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from visionzip.attention import QueriesKeys, merge_keys, patch_scores, read_attention, read_packed_attention
from visionzip.compress import CompressedTokens, compress_alike
from visionzip.config import VisionZipConfig
from visionzip.encoder import choose_tokens
from visionzip.integrations.huggingface import Arguments, Encoded, Family, Modality, check_attributes, stock_features
from visionzip.integrations.placeholders import Held, Run
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
        rotary: positions have three axes (M-RoPE).
        backbone: attribute of the base model that has the language model.
    """

    encoder: Encoder | None = None
    rotary: bool = False
    backbone: str = "language_model"

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
    layers = [_flat(output.pooler_output), *map(_flat, getattr(output, "deepstack_features", None) or ())]
    chosen = _choose(layers, sizes, *read(), _real(arguments[pixels]), config)
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


def _real(pixels: Tensor) -> Tensor:
    """Pixels of all frames, one behind the other: Idefics has them by prompt, with black ones that fill up."""
    if pixels.ndim < 5:
        return pixels
    return pixels.flatten(0, 1)[_shown(pixels).flatten()]


def _shown(pixels: Tensor) -> Tensor:
    """(B, n) bool: which of the images of each prompt (B, n, 3, h, w) are not there only to fill up."""
    return (pixels != 0).flatten(2).any(dim=-1)


def _flat(features: Any) -> Tensor:
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


def _choose(
    layers: list[Tensor],
    sizes: list[Size],
    scores: Tensor | None,
    keys: Tensor | None,
    pixels: Tensor,
    config: VisionZipConfig,
) -> _Chosen:
    """Choose among the tokens of each frame; frames of one size are one batch.

    Args:
        layers: (n, D) tokens of all frames, one behind the other, for the language model's input, and for each of its
            layers that gets some.
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
        if _is_whole(config, size):
            everything = torch.arange(size[0] * size[1], device=tokens[0].device).expand(len(which), -1)
            kept, group = everything, torch.ones_like(everything, dtype=torch.float32)
        else:
            read = EncoderRead(
                tokens[0],
                False,
                scores=batch(scores, which),
                keys=batch(keys, which),
                projected=tokens[0],
                pixels=torch.stack([frames[frame] for frame in which]),
                grid=size,
            )
            chosen = choose_tokens(read, config)
            tokens, kept, group = _in_raster_order(tokens, chosen, config)
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


# --- encoders for pictures of any size, whose patches lie in one packed sequence: Qwen-VL's and GLM-V's ---


@contextmanager
def _read_packed(name: str, base: nn.Module, layer: int, arguments: Arguments) -> Iterator[Scored]:
    encoder, grid = base.visual, arguments[name]
    unit = encoder.spatial_merge_size**2

    def tokens() -> tuple[Tensor, Tensor]:
        scores, keys = (values.unflatten(0, (-1, unit)).mean(dim=1) for values in found[0])
        if hasattr(encoder, "window_size"):  # in the order of its windows
            shape = {"window_size": encoder.window_size, "patch_size": encoder.patch_size}
            order = get_vision_window_index(grid, spatial_merge_size=encoder.spatial_merge_size, **shape)[0].argsort()
            scores, keys = scores[order], keys[order]
        return scores, keys

    with read_packed_attention(encoder.blocks[layer].attn) as found:
        yield tokens


def _packed_layers(base: nn.Module) -> list[int]:
    """All layers, or those that are not cut into windows, counted from the end."""
    depth = len(base.visual.blocks)
    return [layer - depth for layer in getattr(base.visual, "fullatt_block_indexes", range(depth))]


def _grid_frames(name: str, timestamps: bool, base: nn.Module, arguments: Arguments) -> list[Frames]:
    """By ``image_grid_thw``; with timestamps each frame of a video has a run of its own.

    Raises:
        ValueError: it is missing.
    """
    if (grid := arguments.get(name)) is None:
        raise ValueError(f"{name} must have (frames, rows, columns) of each: pass all that the processor returned")
    merge = base.visual.spatial_merge_size
    found = [Frames(count, (rows // merge, columns // merge)) for count, rows, columns in grid.tolist()]
    return [Frames(1, frames.size) for frames in found for _ in range(frames.count)] if timestamps else found


def grid_family(timestamps: bool = False, videos: bool = True) -> SeamFamily:
    """A family like Qwen-VL: pictures of any size, a merger behind the encoder, M-RoPE.

    Args:
        timestamps: each frame of a video has a run of placeholders of its own.
        videos: videos have placeholders of their own kind.
    """
    modalities = {}
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos"))[: 1 + videos]:
        grid = f"{name}_grid_thw"
        encoder = Encoder(partial(_read_packed, grid), _packed_layers)
        modalities[name] = modality(name, pixels, partial(_grid_frames, grid, timestamps), encoder)
    return SeamFamily(modalities, encoder=encoder, rotary=True)


# --- encoders for pictures of one size ---


@contextmanager
def _read_square(
    blocks: str, attention: str, cls_token: bool, base: nn.Module, layer: int, arguments: Arguments
) -> Iterator[Scored]:
    def summarize(read: QueriesKeys) -> tuple[Tensor, Tensor]:
        return patch_scores(read, cls_token), merge_keys(read)[:, int(cls_token) :]

    def tokens() -> tuple[Tensor, Tensor]:
        scores, keys = reader.result()
        patches, side = int(scores.shape[1] ** 0.5), _side(base)
        fields = torch.cat([scores[..., None], keys], dim=-1).mT.unflatten(-1, (patches, patches))
        pooled = F.avg_pool2d(fields, patches // side).flatten(2).mT.flatten(0, 1)
        return pooled[:, 0], pooled[:, 1:]

    with read_attention(getattr(attrgetter(blocks)(base)[layer], attention), summarize) as reader:
        yield tokens


def _side(base: nn.Module) -> int:
    """Tokens along the edge of a picture, by whichever name the family's config has for it."""
    config = base.config
    edge = config.vision_config.image_size
    patches = _first(edge) // _first(config.vision_config.patch_size)
    if (tokens := getattr(config, "mm_tokens_per_image", None)) is not None:
        return int(tokens**0.5)
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:
        return int(patches * ratio)
    return patches // getattr(config, "scale_factor", 1)


def _first(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _square_frames(base: nn.Module, arguments: Arguments) -> list[Frames]:
    pixels = arguments["pixel_values"]
    count = len(pixels) if pixels.ndim == 4 else int(_shown(pixels).sum())
    return [Frames(1, (_side(base),) * 2)] * count


def square_family(
    blocks: str, attention: str = "self_attn", cls_token: bool = False, stacked: bool = True, **options: Any
) -> SeamFamily:
    """A family whose pictures have one size and one run of placeholders each.

    Args:
        blocks: the encoder's layers, dotted, of the base model.
        attention: attribute of a layer that can be read by :func:`visionzip.attention.read_attention`.
        cls_token: the encoder has one, which no token of the language model is made of.
        stacked: as in :class:`Modality`.
        **options: others of :class:`SeamFamily`.
    """
    encoder = Encoder(partial(_read_square, blocks, attention, cls_token), partial(_square_layers, blocks))
    image = modality("image", "pixel_values", _square_frames, encoder, stacked=stacked)
    return SeamFamily({"image": image}, encoder=encoder, **options)


def _square_layers(blocks: str, base: nn.Module) -> list[int]:
    depth = len(attrgetter(blocks)(base))
    return list(range(-depth, 0))


QWEN_VL = grid_family()  # 2 and 2.5
QWEN3_VL = grid_family(timestamps=True)  # also MoE, and 3.5
GLM4V = grid_family(videos=False)  # its videos have the placeholders of images
INTERNVL = square_family("vision_tower.encoder.layer", "attention", cls_token=True)
GEMMA3 = square_family("vision_tower.encoder.layers")
IDEFICS3 = square_family("vision_model.encoder.layers", stacked=False, backbone="text_model")  # and SmolVLM

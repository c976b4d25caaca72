"""The family Gemma 4: a picture or frame of any shape is a list of patches, each with its column and row.

Lists are filled up to one length. The model's pooler averages squares of patches, so scores and keys are averaged alike
here. Each frame of a video has a run of placeholders, between timestamps. Sound is passed on to the stock model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.attention import packed_scores, read_parts
from visionzip.integrations.huggingface import Arguments
from visionzip.integrations.seam.base import Encoder, Frames, Scored, SeamFamily, all_layers, modality
from visionzip.integrations.seam.pairs import of_tokens, packed_attention

Pool = Callable[[Tensor], Tensor]


@contextmanager
def _reading(
    reduce: Callable[..., Any], name: str, base: nn.Module, layer: int, arguments: Arguments
) -> Iterator[tuple[list[Any], Pool]]:
    """Yield what ``reduce`` makes of all patches, and what averages values (S, ...) over those of each token."""
    attention = base.vision_tower.encoder.layers[layer].self_attn
    rotate = sys.modules[type(attention).__module__].apply_multidimensional_rope
    places = arguments[f"{name}_position_ids"]
    real = _real(places)

    def reduced(outputs: dict[str, Tensor], given: dict[str, Any]) -> Any:
        queries, keys = outputs["q_norm"], outputs["k_norm"]  # (B, S, H, Dh); fewer heads of keys
        turned = [rotate(values, *given["position_embeddings"], given["position_ids"]) for values in (queries, keys)]
        turned[1] = turned[1].repeat_interleave(attention.num_key_value_groups, dim=2)
        queries, rotated, keys = (values[real].transpose(0, 1) for values in (*turned, keys))
        return reduce(queries, rotated, keys, real.sum(dim=1).tolist(), attention.scaling)

    def pool(values: Tensor) -> Tensor:
        edge, picture = _edge(base), torch.arange(len(real), device=real.device)[:, None].expand_as(real)[real]
        x, y = (places[real] // edge).unbind(dim=-1)
        # Sorted by picture, row of tokens and column of tokens, the patches of a token lie side by side.
        order = ((picture * (y.max() + 1) + y) * (x.max() + 1) + x).argsort(stable=True)
        return values[order].unflatten(0, (-1, edge**2)).mean(dim=1)

    with read_parts(attention, ("q_norm", "k_norm"), reduced) as found:
        yield found, pool


@contextmanager
def _read(name: str, base: nn.Module, layer: int, arguments: Arguments) -> Iterator[Scored]:
    with _reading(packed_scores, name, base, layer, arguments) as (found, pool):
        yield lambda: (pool(found[0][0]), pool(found[0][1]))


@contextmanager
def _pairs(base: nn.Module, layer: int, arguments: Arguments) -> Iterator[Callable[[], Tensor]]:
    with _reading(packed_attention, "image", base, layer, arguments) as (found, pool):
        yield lambda: of_tokens(pool, found[0], _edge(base) ** 2)


def _real(places: Tensor) -> Tensor:
    """Mark the patches (B, S) that do not only fill up, by their places (B, S, 2)."""
    return (places != -1).all(dim=-1)


def _edge(base: nn.Module) -> int:
    """Count the patches along one edge of a token."""
    return base.config.vision_config.pooling_kernel_size


def _frames(name: str, pixels: str, base: nn.Module, arguments: Arguments) -> list[Frames]:
    """Read the frames from the places of patches.

    Raises:
        ValueError: the places are missing, or they do not fit the pixels or frames.
    """
    values, places = arguments[pixels], arguments.get(f"{name}_position_ids")
    wide, edge = 3 * base.config.vision_config.patch_size**2, _edge(base)
    if places is None or values.ndim != 3 or values.shape[-1] != wide or places.shape != (*values.shape[:2], 2):
        given = None if places is None else tuple(places.shape)
        raise ValueError(
            f"{pixels} must be (N, patches, {wide}) for this model, with {name}_position_ids (N, patches, 2), got "
            f"{tuple(values.shape)} and {given}: pass all that the model's own processor returned"
        )
    sizes = [(y // edge, x // edge) for x, y in (places.amax(dim=1) + 1).tolist()]
    patches = _real(places).sum(dim=1).tolist()
    if [rows * columns * edge**2 for rows, columns in sizes] != patches:
        raise ValueError(
            f"{name}_position_ids are of {patches} patches, which are no pictures of {sizes} tokens of {edge} x {edge} "
            "patches: pass all that the model's own processor returned"
        )
    if name == "image":
        return [Frames(1, size) for size in sizes]
    return _videos(sizes, arguments.get("num_frames_per_video"))


def _videos(sizes: list[tuple[int, int]], counts: Tensor | None) -> list[Frames]:
    """Group frames of these sizes into videos.

    Raises:
        ValueError: the numbers of frames do not fit, or the frames of a video differ in size.
    """
    numbers = [] if counts is None else counts.tolist()
    starts = [sum(numbers[:video]) for video in range(len(numbers))]
    same = all(len({*sizes[start : start + count]}) == 1 for start, count in zip(starts, numbers, strict=True))
    if sum(numbers) != len(sizes) or not same:
        raise ValueError(
            f"num_frames_per_video is {numbers or None} for {len(sizes)} frames of {sorted({*sizes})} tokens: it must "
            "have the number of each video's frames, which are of one size; pass all that the processor returned"
        )
    return [Frames(count, sizes[start]) for start, count in zip(starts, numbers, strict=True)]


def _pixels(name: str, base: nn.Module, arguments: Arguments, pixels: str) -> Tensor:
    return arguments[pixels][_real(arguments[f"{name}_position_ids"])]


def _layers(base: nn.Module) -> list[int]:
    if base.vision_tower is None:
        raise TypeError("this Gemma 4 has no image encoder: there is nothing to zip")
    return all_layers("vision_tower.encoder.layers", base)


_ENCODERS = {
    name: Encoder(partial(_read, name), _layers, partial(_pixels, name), _pairs if name == "image" else None)
    for name in ("image", "video")
}
_FRAMES = {
    name: partial(_frames, name, pixels)
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos"))
}
GEMMA4 = SeamFamily(
    {
        "image": modality("image", "pixel_values", _FRAMES["image"], _ENCODERS["image"]),
        "video": modality("video", "pixel_values_videos", _FRAMES["video"], _ENCODERS["video"], apart=True),
    },
    encoder=_ENCODERS["image"],
    frames=_FRAMES["image"],
)

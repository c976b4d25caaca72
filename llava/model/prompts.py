"""Prompts and images, row by row: which images belong to which prompt, and visual tokens in the place of sentinels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.visual import VisualTokens
from visionzip.integrations.checks import ends_with_an_image


def check_prompts(input_ids: Tensor | None) -> None:
    """Check that there are prompts (B, L).

    Raises:
        ValueError: there are none, or they are empty.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"the model takes prompts of shape (B, L) with B and L at least 1, got {shape}")


def check_mask(input_ids: Tensor, mask: Tensor) -> None:
    """Check that a mask (B, L) fits the prompts (B, L) and leaves something of each.

    Raises:
        ValueError: its shape is another, or a row is all padding.
    """
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"the attention_mask of these prompts has shape {tuple(mask.shape)}, but they have "
            f"{tuple(input_ids.shape)}: it must be the same, or with a cache cover the cache's positions too"
        )
    if not mask.any(dim=1).all():
        row = int((~mask.any(dim=1)).nonzero()[0])
        raise ValueError(f"prompt {row} has no tokens: its attention_mask is 0 everywhere; leave it out")


def check_vocabulary(input_ids: Tensor, mask: Tensor, size: int) -> None:
    """Check that what is not masked of prompts (B, L) is text that the model can read, or the image sentinel.

    Raises:
        ValueError: an id is negative, or not below ``size``.
    """
    outside = mask & (input_ids != IMAGE_TOKEN_INDEX) & ((input_ids < 0) | (input_ids >= size))
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"prompt {row} has the id {int(input_ids[row, column])} at position {column}, but this model's ids are 0 "
            f"to {size - 1}, and {IMAGE_TOKEN_INDEX} for <image>: tokenize with its own tokenizer"
        )


def padding_mask(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Mask (B, L), False where a prompt begins or ends with padding; the same id inside a prompt is text."""
    text = input_ids != pad_token_id
    return (text.cumsum(1) > 0) & (text.flip(1).cumsum(1).flip(1) > 0)


def refuse_sentinels_without_images(input_ids: Tensor | None) -> None:
    """Check that text-only prompts (B, L) have no image sentinel.

    Raises:
        ValueError: they have; an embedding table has no row for it.
    """
    if input_ids is not None and (markers := int((input_ids == IMAGE_TOKEN_INDEX).sum())):
        raise ValueError(
            f"the prompts have {markers} <image> but no images were given: pass images=, or leave <image> out"
        )


def refuse_images_at_the_end(prompts: Sequence[Tensor]) -> None:
    """Check that prompts (L,) with original positions do not end with an image.

    Raises:
        ValueError: one does; what follows would take the last kept token's place for the image's end.
    """
    for row, prompt in enumerate(prompts):
        if prompt[-1] == IMAGE_TOKEN_INDEX:
            raise ends_with_an_image(row)


def images_per_row(markers: list[int], images: int, training: bool) -> list[int]:
    """How many images each prompt takes.

    LLaVA's convention gives a text-only prompt of a mixed batch one dummy image; prompts without one are accepted too.

    Args:
        markers: image sentinels in each prompt.
        images: how many images there are.
        training: a batch of text only may have dummy images (they keep the projector in the graph).

    Raises:
        ValueError: the prompts and the images differ in number.
    """
    with_dummies = [max(1, count) for count in markers]
    if images == sum(with_dummies) and (any(markers) or training):
        return with_dummies
    if images == sum(markers):
        return markers
    raise ValueError(
        f"the prompts have {sum(markers)} <image> (by row: {markers}) but {images} images were given: give one image "
        "for each <image>, in order (a video counts as one for each of its frames)"
    )


def check_images(images: Tensor | Sequence[Tensor]) -> None:
    """Check that there are images, and that a tensor of them has a batch axis.

    Raises:
        TypeError: it is neither a tensor nor a list of tensors.
        ValueError: there are none, or the tensor is one image.
    """
    if not isinstance(images, Tensor | Sequence):
        raise TypeError(
            f"images is a {type(images).__name__}, not a tensor or a list of tensors: prepare images with "
            "llava.mm_utils.process_images"
        )
    if len(images) == 0:
        raise ValueError("images is empty: give at least one, or leave images out for text-only prompts")
    if isinstance(images, Tensor) and images.ndim < 4:
        raise ValueError(
            f"images has shape {tuple(images.shape)}: one image needs a batch axis too (images[None]), for "
            "(N, 3, h, w) or (N, tiles, 3, h, w)"
        )


def first_places(images: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]] | None) -> list[int]:
    """For each image, where the same tensor object, with the same size, is first in the list.

    Raises:
        ValueError: there are more or fewer sizes than images.
    """
    if image_sizes is not None and len(image_sizes) != len(images):
        raise ValueError(f"image_sizes has {len(image_sizes)} entries for {len(images)} images: give one for each")
    sizes = [None] * len(images) if image_sizes is None else [tuple(size) for size in image_sizes]
    places: dict[Any, int] = {}
    return [
        places.setdefault((id(image), size), index)
        for index, (image, size) in enumerate(zip(images, sizes, strict=True))
    ]


def as_tiles(image: Any, index: int, edge: int) -> Tensor:
    """One image, (3, h, w) or (tiles, 3, h, w), as (tiles, 3, h, w).

    Args:
        image: the tensor.
        index: its place among the images, for messages.
        edge: the vision tower's resolution in pixels.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has other dimensions or another resolution, or no tiles.
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"images[{index}] is a {type(image).__name__}, not a tensor: prepare images with "
            "llava.mm_utils.process_images"
        )
    if image.ndim not in (3, 4) or len(image) == 0 or tuple(image.shape[-3:]) != (3, edge, edge):
        raise ValueError(
            f"images[{index}] has shape {tuple(image.shape)}: for this vision tower an image is (3, {edge}, {edge}) "
            f"or (tiles, 3, {edge}, {edge}) for anyres, as llava.mm_utils.process_images makes it"
        )
    return image[None] if image.ndim == 3 else image


class Row(NamedTuple):
    """One prompt as the language model gets it, without padding: L' tokens.

    Attributes:
        embeds: (L', D).
        labels: (L',), visual tokens ignored; None if there are none.
        visual: (L',) bool, where the visual tokens are.
        positions: (L',) int64, from 0.
        sizes: (L',) float32, patches that each visual token stands for in attention, else 1; None without a size bias.
        end: the position behind the last token.
    """

    embeds: Tensor
    labels: Tensor | None
    visual: Tensor
    positions: Tensor
    sizes: Tensor | None
    end: int

    def cut(self, limit: int | None) -> Row:
        """The prompt without what stands at positions from ``limit`` on."""
        if limit is None or self.end <= limit:
            return self
        first = int((self.positions >= limit).int().argmax())
        parts = (None if part is None else part[:first] for part in self[:5])
        return Row(*parts, limit)


def splice(prompt: Tensor, visual: list[VisualTokens], embed: nn.Module, labels: Tensor | None) -> Row:
    """Put visual tokens in the place of one prompt's sentinels.

    A text-only prompt's dummy image adds nothing but its (empty) slice, which ties the projector to the loss: under
    ZeRO and DDP every rank must use every parameter.

    Args:
        prompt: (L,) token ids, without padding.
        visual: for each sentinel, in order; of a text-only prompt, its dummy image.
        embed: the language model's embedding of token ids.
        labels: (L,) or None.
    """
    is_image = prompt == IMAGE_TOKEN_INDEX
    text = embed(prompt[~is_image])
    markers = is_image.nonzero().flatten().tolist()
    if not markers:
        embeds = torch.cat([text, *(image.tokens[:0].to(text) for image in visual)])
        return Row(embeds, labels, is_image, torch.arange(len(text), device=text.device), None, len(text))
    lengths = [end - start - 1 for start, end in zip([-1, *markers], [*markers, len(prompt)], strict=True)]
    label_texts = [None] * len(lengths) if labels is None else labels[~is_image].split(lengths)
    pieces: list[Row] = []
    start = 0
    for number, (piece, label) in enumerate(zip(text.split(lengths), label_texts, strict=True)):
        pieces.append(_piece(piece, label, start, None))
        start = pieces[-1].end
        if number < len(visual):
            ignored = None if labels is None else labels.new_full((len(visual[number].tokens),), IGNORE_INDEX)
            pieces.append(_piece(visual[number].tokens.to(text), ignored, start, visual[number]))
            start = pieces[-1].end
    embeds, label_pieces, is_visual, positions, sizes, _ = zip(*pieces, strict=True)
    has_sizes = any(image.sizes is not None for image in visual)
    return Row(
        torch.cat(embeds),
        None if labels is None else torch.cat(label_pieces),
        torch.cat(is_visual),
        torch.cat(positions),
        torch.cat(sizes) if has_sizes else None,
        start,
    )


def _piece(embeds: Tensor, labels: Tensor | None, start: int, image: VisualTokens | None) -> Row:
    """Text, or an image's tokens, from position ``start`` on."""
    places = torch.arange(len(embeds), device=embeds.device)
    sizes = torch.ones(len(embeds), device=embeds.device)
    end = len(embeds)
    if image is not None:
        places = places if image.places is None else image.places.to(embeds.device)
        sizes = sizes if image.sizes is None else image.sizes.to(sizes)
        end = image.length
    visual = torch.full((len(embeds),), image is not None, device=embeds.device)
    return Row(embeds, labels, visual, start + places, sizes, start + end)


class Padded(NamedTuple):
    """Prompts of a batch: the fields of :class:`Row` as (B, L, …), and a mask (B, L) bool, False for padding.

    Padding has position 0 and size 1.
    """

    embeds: Tensor
    mask: Tensor
    labels: Tensor | None
    visual: Tensor
    positions: Tensor
    sizes: Tensor | None


def pad_rows(rows: list[Row], side: str) -> Padded:
    """Stack prompts of different lengths, with padding on the ``side`` ``"left"`` or ``"right"``."""

    def pad(name: str, value: float) -> Tensor:
        own = [getattr(row, name) for row in rows]
        return pad_sequence(own, batch_first=True, padding_value=value, padding_side=side)

    if any(row.sizes is not None for row in rows):
        rows = [
            row._replace(sizes=torch.ones_like(row.positions, dtype=torch.float32)) if row.sizes is None else row
            for row in rows
        ]
    ones = [torch.ones_like(row.visual) for row in rows]
    return Padded(
        pad("embeds", 0.0),
        pad_sequence(ones, batch_first=True, padding_side=side),
        None if rows[0].labels is None else pad("labels", IGNORE_INDEX),
        pad("visual", False),
        pad("positions", 0),
        None if rows[0].sizes is None else pad("sizes", 1.0),
    )

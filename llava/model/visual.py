"""Visual tokens as the language model gets them: what they are, where they stand, and how many patches each stands for.

With ``positions="original"`` each token has the place that it would have if the image were not compressed, and the text
behind the image goes on where it would then. A contextual token has its target's place. A CLS token, where the model
without VisionZip does not pass it on, has that of the first patch of its tile; a patch of a tile that LLaVA-NeXT cuts
away as padding has that of the nearest one that is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.tiles import Layout, lay_out_tiles, unpad_image
from visionzip.methods import has_size_bias, positions_of
from visionzip.tiles import tile_order


def has_original_positions(tower: VisionTower | None) -> bool:
    """Whether a tower's setting gives kept tokens their original positions."""
    return tower is not None and tower.visionzip is not None and positions_of(tower.visionzip) == "original"


def check_embeds(tower: VisionTower | None, arguments: Mapping[str, Any]) -> None:
    """Check that a user's embeddings come with what the setting's visual tokens need.

    Args:
        tower: the model's.
        arguments: of ``generate``, with ``inputs_embeds``.

    Raises:
        ValueError: positions or sizes are missing.
    """
    setting = None if tower is None else tower.visionzip
    if setting is None:
        return
    for name, needed, what in (
        ("position_ids", has_original_positions(tower), "positions='original'"),
        ("token_sizes", has_size_bias(setting), "a size bias"),
    ):
        if needed and arguments.get(name) is None:
            raise ValueError(
                f"inputs_embeds came without {name}, but this model is zipped with {what}, which embeddings do not "
                "show: give the prompt's ids and images, or what model.prepare makes of them"
            )


@dataclass(frozen=True)
class VisualTokens:
    """What the language model sees of one image, or of one frame of a video.

    Attributes:
        tokens: (n, D), in the language model's width.
        length: positions that they take; the text behind them stands so far behind the image's start.
        places: (n,) int64, from the image's start, each below ``length``; None: one after the other.
        sizes: (n,) float32, patches that each stands for in attention; None without a size bias.
    """

    tokens: Tensor
    length: int
    places: Tensor | None = None
    sizes: Tensor | None = None

    def split(self, frames: int) -> list[VisualTokens]:
        """Take a video apart into its frames, of n // ``frames`` tokens each; what is left over goes to the last."""
        count, length = len(self.tokens) // frames, self.length // frames
        counts = [count] * (frames - 1) + [len(self.tokens) - count * (frames - 1)]
        places = [None] * frames if self.places is None else self.places.split(counts)
        sizes = [None] * frames if self.sizes is None else self.sizes.split(counts)
        return [
            VisualTokens(
                tokens,
                length if number < frames - 1 else self.length - length * number,
                None if own is None else own - length * number,
                size,
            )
            for number, (tokens, own, size) in enumerate(zip(self.tokens.split(counts), places, sizes, strict=True))
        ]


def lay_out(
    encoded: EncodedImage, tower: VisionTower, layout: Layout | None = None, newline: Tensor | None = None
) -> VisualTokens:
    """Make one image's sequence of its tiles.

    Args:
        encoded: behind the projector.
        tower: that has encoded it.
        layout: of its tiles, None where they follow each other.
        newline: (D,) vector behind an image of one tile, or behind each row of a grid that is not zipped.
    """
    tokens, kept = encoded.tokens, encoded.kept
    side = tower.num_patches_per_side
    if kept is None and layout is not None:
        whole = lay_out_tiles(tokens, layout, side, newline)
        return VisualTokens(whole, len(whole))
    places, length = _places(kept, tower, layout, newline is not None)
    parts = [None if part is None else part.flatten(0, 1) for part in (tokens, places, encoded.sizes)]
    if layout is not None:
        dominant, contextual, keeps_cls = tower.counts
        cls = {"cls_token": tower.cls_token, "keeps_cls": keeps_cls}
        order = tile_order(kept[:, :dominant], contextual, layout.grid, (side, side), **cls)
        parts = [None if part is None else part[order.to(part.device)] for part in parts]
    elif newline is not None:
        behind = newline[None].to(tokens), torch.full((1,), length), torch.ones(1)
        parts = [
            None if part is None else torch.cat([part, end.to(part)]) for part, end in zip(parts, behind, strict=True)
        ]
        length += 1
    whole, places, sizes = parts
    return VisualTokens(whole, len(whole) if places is None else length, places, sizes)


def _places(kept: Tensor | None, tower: VisionTower, layout: Layout | None, newline: bool) -> tuple[Tensor | None, int]:
    """Original places (T, n) of an image's tokens, and how many there are; None where they are consecutive."""
    if kept is None or not has_original_positions(tower):
        return None, 0
    if layout is not None:
        return grid_places(kept, layout, tower.num_patches_per_side, newline, tower.cls_token)
    keeps_cls = tower.select_feature == "cls_patch"
    return tile_places(kept, tower.num_patches, tower.cls_token, keeps_cls), len(kept) * tower.num_patches


def tile_places(kept: Tensor, patches: int, cls_token: bool, keeps_cls: bool) -> Tensor:
    """Places of the tokens of tiles that follow each other.

    Args:
        kept: (T, n) positions in the encoder's sequence.
        patches: N, visual tokens of a tile that is not zipped.
        cls_token: position 0 of the encoder's sequence is a CLS token.
        keeps_cls: it is one of the N.

    Returns:
        (T, n) int64, 0 to T * N - 1.
    """
    own = kept if keeps_cls or not cls_token else (kept - 1).clamp(min=0)
    return own + torch.arange(len(kept), device=kept.device)[:, None] * patches


def grid_places(kept: Tensor, layout: Layout, side: int, newline: bool, cls_token: bool) -> tuple[Tensor, int]:
    """Places of the tokens of a LLaVA-NeXT image as :func:`llava.model.tiles.lay_out_tiles` lays out all of them.

    Args:
        kept: (T, n) positions in the encoder's sequence; tile 0 is the whole image.
        layout: of this image.
        side: patches along one edge of a tile.
        newline: a vector ends each row, after what padding added is cut away.
        cls_token: position 0 of the encoder's sequence is a CLS token.

    Returns:
        (T, n) int64, and how many places there are.
    """
    columns, rows = layout.grid
    top, left, height, width = 0, 0, rows * side, columns * side
    if newline:
        whole = unpad_image(torch.arange(height * width).view(1, height, width), layout.size)[0]
        top, left = divmod(int(whole[0, 0]), width)
        height, width = whole.shape
    patch = (kept - int(cls_token)).clamp(min=0)
    tile = torch.arange(len(kept), device=kept.device)[:, None] - 1
    y = (tile // columns * side + patch // side - top).clamp(0, height - 1)
    x = (tile % columns * side + patch % side - left).clamp(0, width - 1)
    places = side**2 + y * (width + newline) + x
    return torch.cat([patch[:1], places[1:]]), side**2 + height * (width + newline)

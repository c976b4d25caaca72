"""What a vision tower has made of an image: tokens, which patches they keep, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedImage:
    """What a vision tower has made of an image, which a model takes in the place of pixels (training from a cache).

    Attributes:
        tokens: (T, N, D) of its T tiles, before the projector.
        kept: (T, N) as in :class:`CompressedTokens`; None if the tower was not zipped.
        sizes: (T, N) as there; None where the setting has no size bias.
    """

    tokens: Tensor
    kept: Tensor | None = None
    sizes: Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> EncodedImage:
        """On another device; data loaders ask for it."""
        return self._each(lambda part: part.to(*args, **kwargs))

    @classmethod
    def join(cls, images: Sequence[EncodedImage]) -> EncodedImage:
        """Images as tiles of one, in order."""
        parts = zip(*((image.tokens, image.kept, image.sizes) for image in images), strict=True)
        return cls(*(None if part[0] is None else torch.cat(part) for part in parts))

    def split(self, counts: Sequence[int]) -> list[EncodedImage]:
        """Cut what was encoded together, (sum of T, N, D), into images of these many tiles."""
        parts = [None if part is None else part.split(list(counts)) for part in (self.tokens, self.kept, self.sizes)]
        return [EncodedImage(*(part and part[place] for part in parts)) for place in range(len(counts))]

    def unflatten(self, images: int) -> EncodedImage:
        """Tiles of so many images with an axis for the images in front."""
        return self._each(lambda part: part.unflatten(0, (images, -1)))

    def flatten(self) -> EncodedImage:
        """What :meth:`unflatten` has made, without that axis."""
        return self._each(lambda part: part.flatten(0, 1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> EncodedImage:
        parts = (self.tokens, self.kept, self.sizes)
        return EncodedImage(*(None if part is None else change(part) for part in parts))

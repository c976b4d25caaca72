"""What every method has in common: what it may read of an encoder, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import Positions, VisionZipConfig

Reads = Literal["scores", "keys", "projected", "pixels", "grid"]


@dataclass(frozen=True)
class EncoderRead:
    """What was read of an image encoder, for B images of S tokens (N patches, and a CLS token where there is one).

    Attributes:
        hidden_states: (B, S, D) output of the scored layer.
        cls_token: position 0 is a CLS token, so that S = N + 1; else S = N.
        scores: (B, N) float32, attention on each patch; None unless the method reads it.
        keys: (B, S, Dk) float32, keys averaged over heads; None unless the method reads them.
        projected: (B, N, P) the patches behind the projector; None unless the method reads them.
        pixels: (B, 3, h, w), what the encoder was given; None where that is not known.
        grid: (rows, columns) of the patches.
    """

    hidden_states: Tensor
    cls_token: bool
    scores: Tensor | None = None
    keys: Tensor | None = None
    projected: Tensor | None = None
    pixels: Tensor | None = None
    grid: tuple[int, int] | None = None

    @property
    def patches(self) -> Tensor:
        """(B, N, D) hidden states of the patches, without CLS."""
        return self.hidden_states[:, int(self.cls_token) :]


class TokenCounts(NamedTuple):
    """What a method leaves of one encoder input (image, tile, frame), from shapes alone.

    Attributes:
        dominant: K, tokens that are kept as they are; counts the CLS token where ``cls_token`` is set.
        contextual: M, tokens that others are merged into.
        cls_token: whether the first of the K is the encoder's CLS token.
    """

    dominant: int
    contextual: int
    cls_token: bool

    @property
    def total(self) -> int:
        """Visual tokens that reach the language model."""
        return self.dominant + self.contextual


@dataclass(frozen=True)
class Method:
    """One way to choose a few of an image's tokens. It knows nothing of model families.

    Attributes:
        name: by which commands, configs and the registry know it.
        summary: one line about it.
        paper: where it comes from; empty for controls and ablations.
        reads: what it needs of the encoder; nothing else is computed.
        choose: ``(read, counts, config) -> CompressedTokens`` with the K and M tokens of ``counts``. Batched,
            with shapes that follow from shapes.
        split: K and M of T tokens; K counts the CLS token where ``keeps_cls``.
        keeps_cls: whether the encoder's CLS token is one of the K.
        keeps_patches: whether each token stands where one patch was. What averages over areas does not fit families
            that lay out the patches of tiles, or look closer at each.
        seeded: other seeds give other choices.
        positions: where the language model has its tokens, if the setting does not say.
        size_bias: whether they are attended to by their size, if the setting does not say.
        check: ``(tokens, grid)``: raises ValueError where T tokens cannot be made of a grid (rows, columns) of patches.
    """

    name: str
    summary: str
    choose: Callable[[EncoderRead, TokenCounts, VisionZipConfig], CompressedTokens]
    reads: frozenset[Reads] = field(default_factory=frozenset)
    paper: str = ""
    split: Callable[[int], tuple[int, int]] = lambda tokens: (tokens, 0)
    keeps_cls: bool = False
    keeps_patches: bool = True
    seeded: bool = False
    positions: Positions = "consecutive"
    size_bias: bool = False
    check: Callable[[int, tuple[int, int]], object] = lambda tokens, grid: None

    def counts(self, config: VisionZipConfig, patches: int, cls_token: bool) -> TokenCounts:
        """K and M of one encoder input under a setting; all of its tokens where the budget is no smaller.

        Args:
            config: the setting.
            patches: N.
            cls_token: whether the encoder has one.
        """
        keeps_cls = self.keeps_cls and cls_token
        length = patches + int(keeps_cls)
        tokens = config.tokens(patches)
        dominant, contextual = (config.dominant, config.contextual) if config.keep is None else self.split(tokens)
        if tokens >= length:
            return TokenCounts(length, 0, keeps_cls)
        return TokenCounts(dominant, contextual, keeps_cls)


def finite(values: Tensor) -> Tensor:
    """Take NaN and infinity for 0, in float32: what is chosen by them is no choice, but still K different patches.

    Whoever gets the tokens refuses them (:func:`visionzip.encoder.check_tokens`); in here that would wait for the host.
    """
    return values.detach().float().nan_to_num(0.0, 0.0, 0.0)


def kept_patches(read: EncoderRead, indices: Tensor) -> CompressedTokens:
    """The tokens of some patches, in the order of the sequence; all others are dropped.

    Args:
        read: of B images.
        indices: (B, K) int64 numbers of patches, in any order, each at most once.
    """
    positions = indices.sort(dim=1).values + int(read.cls_token)
    states = read.hidden_states
    return CompressedTokens(
        tokens=states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1])),
        dominant_indices=positions,
        target_indices=positions[:, :0],
        assignment=torch.full(states.shape[:2], -1, dtype=torch.int64, device=states.device),
    )


def top_patches(read: EncoderRead, values: Tensor, count: int) -> CompressedTokens:
    """The patches of highest value (B, N); equal values resolve to the lower index, on any device."""
    return kept_patches(read, values.sort(dim=1, descending=True, stable=True).indices[:, :count])

"""What all methods share: what they may read from an encoder, how they describe themselves, and their result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from visionzip.compress import CompressedTokens
from visionzip.config import Positions, VisionZipConfig

Reads = Literal["scores", "keys", "projected", "pixels", "grid"]


class EncoderRead:
    """What was read from an image encoder, for B images of S tokens (N patches, and a CLS token where there is one).

    A part that was not read is None when it is passed in, and asking for it is an error: :attr:`Method.reads` names the
    parts that a method uses.

    Attributes:
        hidden_states: (B, S, D) output of the scored layer.
        cls_token: whether position 0 is a CLS token, so that S = N + 1; otherwise S = N.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        cls_token: bool,
        scores: Tensor | None = None,
        keys: Tensor | None = None,
        projected: Tensor | None = None,
        pixels: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.hidden_states, self.cls_token = hidden_states, cls_token
        self._parts: dict[str, Any] = {
            "scores": scores,
            "keys": keys,
            "projected": projected,
            "pixels": pixels,
            "grid": grid,
        }

    @property
    def patches(self) -> Tensor:
        """(B, N, D) hidden states of the patches, without CLS."""
        return self.hidden_states[:, int(self.cls_token) :]

    @property
    def scores(self) -> Tensor:
        """(B, N) float32, the attention on each patch."""
        return self._part("scores")

    @property
    def keys(self) -> Tensor:
        """(B, S, Dk) float32, the keys averaged over heads."""
        return self._part("keys")

    @property
    def projected(self) -> Tensor:
        """(B, N, P), the patches behind the projector."""
        return self._part("projected")

    @property
    def pixels(self) -> Tensor:
        """(B, 3, h, w), the encoder's input."""
        return self._part("pixels")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        return self._part("grid")

    def has(self, part: Reads) -> bool:
        """Say whether a part was read."""
        return self._parts[part] is not None

    def replace(self, **parts: Any) -> EncoderRead:
        """Return a copy in which these arguments of the class have other values."""
        own = {"hidden_states": self.hidden_states, "cls_token": self.cls_token, **self._parts}
        return EncoderRead(**own | parts)

    def _part(self, name: Reads) -> Any:
        if (value := self._parts[name]) is None:
            raise ValueError(
                f"the method uses read.{name}, which was not read from the encoder: name it in the method's reads, "
                f'Method(…, reads=frozenset({{"{name}"}}))'
            )
        return value


class TokenCounts(NamedTuple):
    """How many tokens of one encoder input (image, tile or frame) a method keeps; the numbers follow from shapes alone.

    Attributes:
        dominant: K, tokens that are kept unchanged; a kept CLS token is one of them.
        contextual: M, tokens that others are merged into.
        cls_token: whether the encoder's CLS token is kept, as the first of the K.
    """

    dominant: int
    contextual: int
    cls_token: bool

    @property
    def total(self) -> int:
        """K + M, the visual tokens that reach the language model."""
        return self.dominant + self.contextual


@dataclass(frozen=True)
class Method:
    """One way to choose a few of an image's tokens. A method knows nothing about model families.

    Attributes:
        name: the name that commands, settings and the registry have for it.
        summary: what it does, in one line.
        choose: ``(read, counts, config) -> CompressedTokens`` with the K and M tokens of ``counts``. It chooses for a
            whole batch at once, and shapes follow from shapes.
        reads: the parts of :class:`EncoderRead` that it uses; no other part that costs anything is computed.
        paper: the source; empty for controls and ablations.
        split: ``(tokens) -> (K, M)``, which K and M the budget T is split into; K counts a kept CLS token.
        keeps_cls: whether the encoder's CLS token is one of the K.
        keeps_patches: whether each token comes from one patch. A method that averages over areas sets False; it does
            not fit families that lay out the patches of tiles, or that look closer at single patches.
        seeded: whether the choice depends on ``VisionZipConfig.seed``.
        positions: where its tokens stand in the language model, unless the setting says it.
        size_bias: whether its tokens' attention grows with their size, unless the setting says it.
        check: ``(tokens, grid)``, which raises ValueError if it cannot make T tokens from a grid (rows, columns) of
            patches.
        parts: the setting of each encoder input of a call, where these differ; ``choose`` is then not called.
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
    parts: tuple[VisionZipConfig, ...] = ()

    def counts(self, config: VisionZipConfig, patches: int, cls_token: bool) -> TokenCounts:
        """Compute K and M of one encoder input; if the budget covers all of its tokens, all are kept.

        Args:
            config: the setting.
            patches: N, the patches of the input.
            cls_token: whether the encoder has a CLS token.
        """
        keeps_cls = self.keeps_cls and cls_token
        length = patches + int(keeps_cls)
        tokens = config.tokens(patches)
        dominant, contextual = (config.dominant, config.contextual) if config.keep is None else self.split(tokens)
        if tokens >= length:
            return TokenCounts(length, 0, keeps_cls)
        return TokenCounts(dominant, contextual, keeps_cls)


def finite(values: Tensor) -> Tensor:
    """Convert to float32, with 0 in place of NaN and infinity, so that K different patches are chosen in any case.

    :func:`visionzip.encoder.check_tokens` refuses the tokens later. A check in here would have to wait for the host.
    """
    return values.detach().float().nan_to_num(0.0, 0.0, 0.0)


def kept_patches(read: EncoderRead, indices: Tensor) -> CompressedTokens:
    """Keep the tokens of some patches, in the order of the sequence, and drop all others.

    Args:
        read: what was read from the encoder, for B images.
        indices: (B, K) int64, the numbers of the patches, in any order, each at most once.
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
    """Keep the ``count`` patches of highest value (B, N); equal values resolve to the lower index on every device."""
    return kept_patches(read, values.sort(dim=1, descending=True, stable=True).indices[:, :count])

"""The setting of VisionZip: how many tokens to keep, where to look, how to merge."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

MergeRule = Literal["released", "average"]
Positions = Literal["consecutive", "original"]


@dataclass(frozen=True)
class VisionZipConfig:
    """How a vision tower compresses its tokens. Checks itself; immutable, hashable, picklable.

    Args:
        dominant: tokens to keep by attention, at least 1. Counts the CLS token where the encoder has one, as in the
            released package: 54 is CLS + 53 patches. LLaVA-NeXT: per tile.
        contextual: tokens to merge the rest into, at least 0 (0 drops the rest). LLaVA-NeXT: per tile.
        layer: encoder layer that is scored, and whose output is kept. -2 is the penultimate one, as in the paper.
        merge: ``"released"``: target + mean of the tokens assigned to it, as the published code does;
            ``"average"``: mean over the target and its assigned tokens, as the paper's text says.
        method: how tokens are chosen, a name of :data:`visionzip.methods.METHODS`.
        keep: T, tokens to keep in all, or their share of the patches (0.25); it takes the place of ``dominant`` and
            ``contextual``. LLaVA-NeXT: per tile.
        seed: of methods that draw at random, 0 or more.
        positions: where the kept tokens stand in the language model: ``"consecutive"``, as released, or
            ``"original"``: where they would stand if all were there, and the text behind them likewise.
        size_bias: add the logarithm of how many patches a kept token stands for to its attention logits in the language
            model (ToMe, arXiv 2210.09461). None, here and in ``positions``, is the method's own.

        max_tokens: of a ``keep`` that is a share, the most tokens of one image (tile, frame): with 0.25, a photograph
            of 12 megapixels is 2961 of Qwen2.5-VL's 11 844 tokens, and with ``max_tokens=1024`` it is 1024.
        min_tokens: of such a share, the least, as long as the image has so many: small images need most of theirs.
        video_keep: tokens of a whole video, or their share (0.1), chosen among all its frames at once, by ``method``: a
            frame with more to see keeps more, and one may keep none. None: each frame is chosen from alone, like an
            image. For families behind transformers' seam that take videos (Qwen-VL, Gemma 4).

    Raises:
        TypeError: a number or a switch is of the wrong type.
        ValueError: a number is outside its limits, ``merge`` or ``positions`` is unknown, a method other than
            VisionZip has no ``keep``, or one that is no share has ``max_tokens`` or ``min_tokens``.

    The defaults are the paper's 64-token setting of LLaVA-1.5 (Table 1).
    """

    dominant: int = 54
    contextual: int = 10
    layer: int = -2
    merge: MergeRule = "released"
    method: str = "visionzip"
    keep: int | float | None = None
    seed: int = 0
    positions: Positions | None = None
    size_bias: bool | None = None
    max_tokens: int | None = None
    min_tokens: int = 1
    video_keep: int | float | None = None

    def __post_init__(self) -> None:
        for name in ("dominant", "contextual", "layer", "seed", "max_tokens", "min_tokens"):
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
            object.__setattr__(self, name, int(value))  # numpy's integers do not go into JSON
        if self.dominant < 1:
            raise ValueError(
                f"dominant={self.dominant} is below 1: keep at least one token (it counts the CLS token; "
                "the paper's settings are 54, 108 and 162)"
            )
        if self.contextual < 0:
            raise ValueError(f"contextual={self.contextual} is below 0: use 0 to keep dominant tokens only")
        for name, known in (("merge", get_args(MergeRule)), ("positions", (None, *get_args(Positions)))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, filter(None, known)))}")
        if not isinstance(self.size_bias, bool | None):
            raise TypeError(f"size_bias={self.size_bias!r} must be True or False")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is outside 0 to 2**64 - 1")
        self._check_keep()
        self._check_limits()
        if self.video_keep is not None:
            self._check_tokens("video_keep", "tokens of a video")

    def _check_keep(self) -> None:
        if self.keep is None:
            if self.method != "visionzip":
                raise ValueError(
                    f"method={self.method!r} needs keep, the tokens to keep (64) or their share of the patches (0.25); "
                    "dominant and contextual are VisionZip's own"
                )
            return
        self._check_tokens("keep", "patches")

    def _check_tokens(self, name: str, of_what: str) -> None:
        """Check a number of tokens or a share."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
        value = int(value) if isinstance(value, Integral) else float(value)
        object.__setattr__(self, name, value)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name}={value} is below 1: keep at least one token")
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(
                f"{name}={value} is outside 0 to 1: a fraction is a share of the {of_what}; for a number of tokens "
                "give an integer"
            )

    def _check_limits(self) -> None:
        limits = {"max_tokens": self.max_tokens, "min_tokens": self.min_tokens}
        for name, value in limits.items():
            if value in (None, type(self).__dataclass_fields__[name].default):
                continue
            if value < 1:
                raise ValueError(f"{name}={value} is below 1: keep at least one token")
            if not isinstance(self.keep, float):
                raise ValueError(
                    f"{name}={value} limits a share of each image's tokens, but the budget is {self}: give keep a "
                    "share (0.25), or leave it out"
                )
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} is below min_tokens={self.min_tokens}: lower that, or leave it out"
            )

    def tokens(self, patches: int) -> int:
        """Visual tokens that the setting asks for of one image (tile, frame) of N patches: at least 1."""
        if self.keep is None:
            return self.dominant + self.contextual
        if isinstance(self.keep, int):
            return self.keep
        tokens = max(round(self.keep * patches), min(self.min_tokens, patches))
        return tokens if self.max_tokens is None else min(tokens, self.max_tokens)

    def of_videos(self) -> VisionZipConfig:
        """The setting of whole videos, as if each were one image; only with ``video_keep``."""
        return dataclasses.replace(self, keep=self.video_keep, video_keep=None, max_tokens=None, min_tokens=1)

    def __str__(self) -> str:
        """The budget as messages have it: ``dominant=54 + contextual=10``, ``keep=0.25, max_tokens=99``."""
        if self.keep is None:
            return f"dominant={self.dominant} + contextual={self.contextual}"
        limits = {"max_tokens": self.max_tokens, "min_tokens": None if self.min_tokens == 1 else self.min_tokens}
        return ", ".join([f"keep={self.keep}", *(f"{name}={value}" for name, value in limits.items() if value)])

    def to_dict(self) -> dict[str, Any]:
        """The plain dict that is stored in ``model.config.visionzip``: the budget, and what is not the default."""
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unsaid = ("dominant", "contextual") if self.keep is not None else ()
        optional = ("method", "keep", "seed", "positions", "size_bias", "max_tokens", "min_tokens", "video_keep")
        return {
            name: value
            for name, value in values.items()
            if name not in unsaid and not (name in optional and value == defaults[name])
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VisionZipConfig:
        """Read a stored setting back.

        Raises:
            ValueError: a key is not one of this class's.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown VisionZip settings {unknown}: known are {sorted(known)}")
        return cls(**values)

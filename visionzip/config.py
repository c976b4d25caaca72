"""The setting of a zipped model: how many tokens are kept, by which method, and where they stand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

MergeRule = Literal["released", "average"]
Positions = Literal["consecutive", "original"]


@dataclass(frozen=True)
class VisionZipConfig:
    """How the visual tokens of each image, tile or frame are compressed.

    A setting checks itself when it is made, and it is immutable, hashable and picklable. The defaults are the paper's
    64-token setting of LLaVA-1.5 (Table 1).

    Args:
        dominant: how many tokens to keep by attention, at least 1. It counts the CLS token of an encoder that has one,
            as in the released package: 54 is CLS + 53 patches. For LLaVA-NeXT it is a number per tile.
        contextual: how many tokens to merge the others into, at least 0; with 0 the others are dropped. For LLaVA-NeXT
            it is a number per tile.
        layer: the encoder layer that is scored and whose output is kept; -2 is the penultimate one, as in the paper.
        merge: how a contextual token is computed: ``"released"`` is the target plus the mean of the tokens assigned to
            it, as in the published code; ``"average"`` is the mean of the target and these tokens, as in the paper's
            text. :func:`visionzip.compress_tokens` has both formulas.
        method: how tokens are chosen: a name of :data:`visionzip.methods.METHODS`.
        keep: T, how many tokens to keep in all, or their share of the patches (0.25), in place of ``dominant`` and
            ``contextual``. For LLaVA-NeXT it is per tile.
        seed: the seed of methods that draw at random, 0 or more.
        positions: where kept tokens stand in the language model: ``"consecutive"``, as in the released package, or
            ``"original"``, where kept tokens and the text after them have the positions that they have in the
            uncompressed prompt. None stands for the method's default.
        size_bias: whether log(s) is added to the attention logits of a token that stands for s patches, in every layer
            of the language model (ToMe, arXiv 2210.09461). None stands for the method's default.
        max_tokens: the most tokens that an image, tile or frame keeps if ``keep`` is a share. With ``keep=0.25`` a
            photograph of 12 megapixels keeps 2961 of Qwen2.5-VL's 11 844 tokens; with ``max_tokens=1024`` it keeps
            1024.
        min_tokens: the fewest tokens that an image, tile or frame keeps if ``keep`` is a share; an image with fewer
            tokens keeps all of them.
        video_keep: how many tokens of a whole video to keep, or their share (0.1). They are chosen by ``method`` among
            all its frames at once, so that a frame that shows more keeps more, and another may keep none. With None,
            tokens are chosen in each frame alone, as in an image. Only families behind transformers' seam that take
            videos have this (Qwen-VL, Gemma 4).

    Raises:
        TypeError: a number or a switch has the wrong type.
        ValueError: a number is outside its limits; ``merge`` or ``positions`` is unknown; a method other than VisionZip
            has no ``keep``; or ``max_tokens`` or ``min_tokens`` is given and ``keep`` is no share.
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
            value: Any = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
            object.__setattr__(self, name, int(value))  # JSON takes no numpy integers
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
        if not isinstance(self.method, str):
            raise TypeError(
                f"method={self.method!r} must be a method's name, such as 'visionzip', not {type(self.method).__name__}"
            )
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
        """Check a setting that is a number of tokens or a share."""
        value: Any = getattr(self, name)
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
            if value is None or value == type(self).__dataclass_fields__[name].default:
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
        """Count the visual tokens that the setting asks for of an image, tile or frame of N patches: at least 1."""
        if self.keep is None:
            return self.dominant + self.contextual
        if isinstance(self.keep, int):
            return self.keep
        tokens = max(round(self.keep * patches), min(self.min_tokens, patches))
        return tokens if self.max_tokens is None else min(tokens, self.max_tokens)

    def of_videos(self) -> VisionZipConfig:
        """Return the setting for whole videos, which treats each as one image; only for one with ``video_keep``."""
        return dataclasses.replace(self, keep=self.video_keep, video_keep=None, max_tokens=None, min_tokens=1)

    def __str__(self) -> str:
        """Word the budget for messages: ``dominant=54 + contextual=10`` or ``keep=0.25, max_tokens=99``."""
        if self.keep is None:
            return f"dominant={self.dominant} + contextual={self.contextual}"
        limits = {"max_tokens": self.max_tokens, "min_tokens": None if self.min_tokens == 1 else self.min_tokens}
        return ", ".join([f"keep={self.keep}", *(f"{name}={value}" for name, value in limits.items() if value)])

    def to_dict(self) -> dict[str, Any]:
        """Return the plain dict that is stored in ``model.config.visionzip``, without defaults of optional settings."""
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unused: tuple[str, ...] = ("dominant", "contextual") if self.keep is not None else ()
        optional = ("method", "keep", "seed", "positions", "size_bias", "max_tokens", "min_tokens", "video_keep")
        return {
            name: value
            for name, value in values.items()
            if name not in unused and not (name in optional and value == defaults[name])
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VisionZipConfig:
        """Read a setting back that :meth:`to_dict` has written.

        Raises:
            TypeError: a value has the wrong type.
            ValueError: a key is unknown, or a value is outside its limits.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown VisionZip settings {unknown}: known are {sorted(known)}")
        return cls(**values)

"""The setting of VisionZip: how many tokens to keep, where to look, how to merge."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

MergeRule = Literal["released", "average"]


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

    Raises:
        TypeError: a count or the layer is not an integer.
        ValueError: a count is below its limit, or ``merge`` is unknown.

    The defaults are the paper's 64-token setting of LLaVA-1.5 (Table 1).
    """

    dominant: int = 54
    contextual: int = 10
    layer: int = -2
    merge: MergeRule = "released"

    def __post_init__(self) -> None:
        for name in ("dominant", "contextual", "layer"):
            value = getattr(self, name)
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
        if self.merge not in get_args(MergeRule):
            raise ValueError(f"merge={self.merge!r} is unknown: use one of {', '.join(map(repr, get_args(MergeRule)))}")

    @property
    def num_tokens(self) -> int:
        """Visual tokens per image (LLaVA-NeXT: per tile) that reach the language model."""
        return self.dominant + self.contextual

    def to_dict(self) -> dict[str, Any]:
        """The plain dict that is stored in ``model.config.visionzip``."""
        return dataclasses.asdict(self)

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

"""What VisionZip is set to by the page's controls."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from visionzip import unzip, visionzip
from visionzip.config import MergeRule, Positions


@dataclass(frozen=True)
class Setting:
    """What VisionZip is set to.

    Attributes:
        keep: tokens of each image, tile or frame, or their share of the patches.
        method: as in :func:`visionzip.visionzip`, like the next two.
        positions: None is the method's own.
        size_bias: None is the method's own.
        layer: None is the family's default, like the next two.
        merge: of VisionZip.
        seed: of methods that draw at random.
        split: (dominant, contextual), which holds where VisionZip keeps as many; None is VisionZip's usual split.
        max_tokens: most tokens of each image, tile or frame of a share; a number of tokens says all by itself.
        min_tokens: the least, likewise.
        video_keep: tokens of a whole video, or their share, in families that can choose among all of its frames.
    """

    keep: int | float
    method: str = "visionzip"
    positions: Positions | None = None
    size_bias: bool | None = None
    layer: int | None = None
    merge: MergeRule | None = None
    seed: int | None = None
    split: tuple[int, int] | None = None
    max_tokens: int | None = None
    min_tokens: int = 1
    video_keep: int | float | None = None

    def put_on(self, model: Any) -> None:
        """Zip a model with it.

        Raises:
            ValueError: they do not go together.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the page shows that nothing is compressed
            visionzip(
                unzip(model),
                **self._budget(),
                method=self.method,
                positions=self.positions,
                size_bias=self.size_bias,
                layer=self.layer,
                merge=self.merge,
                seed=self.seed,
                video_keep=self.video_keep,
            )

    def _budget(self) -> dict[str, Any]:
        asked = self.max_tokens if self.keep == 1.0 and type(self.keep) is float else self.keep
        if self.split and self.method == "visionzip" and asked == sum(self.split):
            return {"dominant": self.split[0], "contextual": self.split[1]}
        limits = {"max_tokens": self.max_tokens, "min_tokens": self.min_tokens}
        return {"keep": self.keep} | (limits if isinstance(self.keep, float) else {})

    def __str__(self) -> str:
        budget = f"{self.keep} tokens"
        if isinstance(self.keep, float):
            budget = f"{self.keep:.0%} of the patches"
            budget += f", at most {self.max_tokens} tokens" if self.max_tokens else ""
            budget += f", at least {self.min_tokens} tokens" if self.min_tokens > 1 else ""
        positions = f", {self.positions} positions" if self.positions else ""
        bias = "" if self.size_bias is None else f", size bias {'on' if self.size_bias else 'off'}"
        return f"{self.method}, {budget}{positions}{bias}"

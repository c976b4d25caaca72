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
    """

    keep: int | float
    method: str = "visionzip"
    positions: Positions | None = None
    size_bias: bool | None = None
    layer: int | None = None
    merge: MergeRule | None = None
    seed: int | None = None
    split: tuple[int, int] | None = None

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
            )

    def _budget(self) -> dict[str, Any]:
        if self.split and self.method == "visionzip" and self.keep == sum(self.split):
            return {"dominant": self.split[0], "contextual": self.split[1]}
        return {"keep": self.keep}

    def __str__(self) -> str:
        budget = f"{self.keep} tokens" if isinstance(self.keep, int) else f"{self.keep:.0%} of the patches"
        positions = f", {self.positions} positions" if self.positions else ""
        bias = "" if self.size_bias is None else f", size bias {'on' if self.size_bias else 'off'}"
        return f"{self.method}, {budget}{positions}{bias}"

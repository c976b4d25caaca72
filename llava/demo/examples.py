"""Examples of the page, each a click: the paper's figures on scenes that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from llava.demo.uploads.images import Upload


@dataclass(frozen=True)
class Example:
    """One of the paper's figures.

    Attributes:
        label: of its button.
        scene: the image's name in ``assets``.
        question: that is asked about it.
        view: of the picture: ``"kept"``, ``"attention"``, ``"pairs"`` (what each patch attends to).
        hint: what there is to see.
        layer: encoder layer, from 0, that is shown at first; None for the one that decides.
    """

    label: str
    scene: str
    question: str
    view: str
    hint: str
    layer: int | None = None

    def upload(self) -> Upload:
        """Its image."""
        return Upload(self.scene, (files("llava.demo") / "assets" / self.scene).read_bytes())


EXAMPLES = (
    Example(
        "1: fewer tokens",
        "scene-ring.jpg",
        "What color is the ring?",
        "kept",
        "Figure 1: compare the answers and their cost; then make the budget smaller and ask again.",
    ),
    Example(
        "2: attention",
        "scene-letters.jpg",
        "Which letter or digit is blue?",
        "attention",
        "Figure 2: the histogram below shows that most patches get next to no attention.",
    ),
    Example(
        "5: layers",
        "scene-cross.jpg",
        "Which letter or digit is green?",
        "attention",
        "Figure 5: move the layer slider and see attention gather on a few patches.",
        0,
    ),
    Example(
        "11: redundancy",
        "scene-tiles.jpg",
        "Where is the white 4 relative to the cyan 7?",
        "attention",
        "Figure 11: redundancy again, on another image.",
    ),
    Example(
        "12, 13: layers",
        "scene-circle.jpg",
        "Is there a cyan circle?",
        "attention",
        "Figures 12 and 13: move the layer slider, as in Figure 5.",
        0,
    ),
    Example(
        "14: misalignment",
        "scene-wall.jpg",
        "What pattern does the background have?",
        "pairs",
        "Figure 14: point at a patch; what it attends to most stands elsewhere in the image, and is kept.",
    ),
)

"""The scenes test set as a task of lmms-eval: ``--include_path tests/lmms_task --tasks scenes_sample``, at the root."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def visuals(doc: dict[str, Any], **_: Any) -> list[Image.Image]:
    """The one image of a question."""
    image = doc["image"]
    return [Image.open(io.BytesIO(image["bytes"])) if isinstance(image, dict) else image]


def text(doc: dict[str, Any], **_: Any) -> str:
    """The question."""
    return doc["question"]


def right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the right word."""
    said = results[0].strip().removesuffix(".").casefold()
    return {"exact": float(said == doc["answer"].casefold())}

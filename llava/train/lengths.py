"""What ``model_max_length`` leaves of the records, before a model has seen them."""

from __future__ import annotations

from typing import Any

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.visual import has_original_positions
from llava.train.data import InstructionData

_LOOKED_AT = 256  # records, spread over all: a fraction of a second


def visual_tokens_at_least(model: Any) -> int:
    """The fewest positions that an image takes in a model's prompts: those of one tile; 0 for a language model."""
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    if tower is None:
        return 0
    return tower.num_patches if tower.visionzip is None or has_original_positions(tower) else tower.counts.total


def cut_share(data: InstructionData, limit: int, visual_tokens: int) -> tuple[float, int]:
    """The share of records of which nothing is learnt as all answers are behind the limit.

    Args:
        data: what is trained on.
        limit: longest prompt in tokens, visual ones included.
        visual_tokens: of an image, or fewer: then the share is one that at least is lost.

    Returns:
        The share, and how many records it is of.
    """
    places = range(0, len(data), -(-len(data) // _LOOKED_AT))
    lost = 0
    for place in places:
        sample = data.text(place)
        learnt = (sample["labels"][1:] != IGNORE_INDEX).nonzero()
        start = 1 + int(learnt[0]) if len(learnt) else len(sample["labels"])
        images = int((sample["input_ids"][:start] == IMAGE_TOKEN_INDEX).sum())
        lost += start + images * (visual_tokens - 1) >= limit
    return lost / len(places), len(places)

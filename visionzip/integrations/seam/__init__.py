"""Families such as Qwen-VL: tokens are chosen among those that the model's own encoder returns ("the seam").

What a family of one's own is made of is here; :mod:`visionzip.integrations.seam.families` has those of transformers.
"""

from visionzip.integrations.seam.base import Encoder, Frames, Scored, SeamFamily, modality

__all__ = ["Encoder", "Frames", "Scored", "SeamFamily", "modality"]

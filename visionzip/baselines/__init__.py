"""Pruning inside the language model, with which VisionZip is compared."""

from visionzip.baselines.fastv import fastv, fastv_keep
from visionzip.baselines.language import remove_pruning
from visionzip.baselines.sparsevlm import sparsevlm

__all__ = ["fastv", "fastv_keep", "remove_pruning", "sparsevlm"]

"""Prune visual tokens inside the language model, by FastV or SparseVLM, to which VisionZip is compared."""

from visionzip.language.fastv import fastv, fastv_keep
from visionzip.language.pruning import remove_pruning
from visionzip.language.sparsevlm import sparsevlm

__all__ = ["fastv", "fastv_keep", "remove_pruning", "sparsevlm"]

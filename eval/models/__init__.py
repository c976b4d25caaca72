"""The models that answer: a file each for LLaVA's own interface and for a processor with its chat template.

Nothing else in ``eval/`` knows how a model takes prompts and images. To add a kind, write a subclass of
:class:`eval.models.base.Model` and name it in :func:`kind_of`.
"""

from __future__ import annotations

from typing import Any

from llava.model.stock.processor_model import takes_processor

from .base import Model
from .hf import ProcessorModel
from .llava import LlavaModel


def kind_of(checkpoint: Any) -> type[Model]:
    """The class that runs a checkpoint, by its ``config.json``: LLaVAs of both layouts have LLaVA's own prompts."""
    return ProcessorModel if takes_processor(vars(checkpoint)) else LlavaModel

"""What ``visionzip`` and ``unzip`` may and may not change: a model's outputs, what hangs on it, and its classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two models' outputs are the same ones, to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on the model: attributes, hooks, parameters, the class of each module, and the config."""
    modules = {
        name: (type(module), {key: dict(v) if isinstance(v, dict) else v for key, v in vars(module).items()})
        for name, module in model.named_modules()
    }
    return {"modules": modules, "config": copy.deepcopy(vars(model.config))}


def classes_of(model: nn.Module) -> dict[type, dict[str, Any]]:
    """The classes of all modules and their bases, each with its attributes."""
    return {base: dict(vars(base)) for module in model.modules() for base in type(module).__mro__}

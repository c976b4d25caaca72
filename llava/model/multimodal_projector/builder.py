"""Projectors from the vision tower's width to the language model's."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def build_vision_projector(config: Any) -> nn.Module:
    """The projector that ``config.mm_projector_type`` names.

    Args:
        config: needs ``mm_hidden_size`` (width of the visual tokens) and ``hidden_size``; ``mm_projector_type`` is
            ``"linear"`` (also if absent), ``"mlp{N}x_gelu"`` (N linear layers with GELU between) or ``"identity"``.

    Returns:
        A module from (…, mm_hidden_size) to (…, hidden_size), with LLaVA's parameter names.

    Raises:
        ValueError: the type is unknown, or ``identity`` between different widths.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        if config.mm_hidden_size != config.hidden_size:
            raise ValueError(
                f"mm_projector_type='identity' cannot map mm_hidden_size={config.mm_hidden_size} to "
                f"hidden_size={config.hidden_size}: use 'linear' or 'mlp2x_gelu'"
            )
        return nn.Identity()
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        return nn.Sequential(*layers)
    raise ValueError(f"mm_projector_type={kind!r} is unknown: use 'linear', 'mlp2x_gelu' (any depth) or 'identity'")

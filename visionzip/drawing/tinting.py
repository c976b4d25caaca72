"""The image in other colours, as figures show what is kept and merged: (h, w, 3) float32 in 0..1."""

from __future__ import annotations

import math
from colorsys import hsv_to_rgb

import torch
from torch import Tensor

from visionzip.token_map import TokenMap


def dominant_pixels(tokens: TokenMap) -> Tensor:
    """All patches whitened but the dominant ones."""
    return torch.where(_per_pixel(tokens, tokens.zipped_roles.dominant), tokens.image, _whitened(tokens))


def group_pixels(tokens: TokenMap) -> Tensor:
    """All patches in the colours of their groups, one for each contextual token, but the dominant ones, in grey."""
    grey = 0.62 + 0.16 * tokens.image.mean(dim=-1, keepdim=True)
    return torch.where(_per_pixel(tokens, tokens.zipped_roles.dominant), grey, _tinted(tokens))


def overlay_pixels(tokens: TokenMap) -> Tensor:
    """The dominant patches as they are among the others in pale colours of their groups."""
    pale = 0.5 * _tinted(tokens) + 0.5  # or the dominant patches would be lost among the colours
    return torch.where(_per_pixel(tokens, tokens.zipped_roles.dominant), tokens.image, pale)


def _whitened(tokens: TokenMap) -> Tensor:
    return 0.2 * tokens.image + 0.8


def _tinted(tokens: TokenMap) -> Tensor:
    """All patches in the colours of their groups; whitened without one, as those that are dropped with M = 0."""
    role = tokens.zipped_roles
    colors = torch.cat([_group_colors(len(role.targets)), torch.zeros(1, 3)])  # the last one, -1, is of no group
    tint = 0.35 * tokens.image.mean(dim=-1, keepdim=True) + 0.65 * _per_pixel(tokens, colors[role.groups])
    return torch.where(_per_pixel(tokens, role.groups >= 0), tint, _whitened(tokens))


def _group_colors(number: int) -> Tensor:
    """Colours (number, 3) in 0..1, all different, neighbours far apart.

    Steps of the golden ratio around the circle of hues: groups that follow each other lie side by side in the image.
    """
    golden = (math.sqrt(5) - 1) / 2
    # Brightness tells those apart that are neighbours on the circle, when there are many.
    colors = [hsv_to_rgb(slot * golden % 1, 0.8, 1 - 0.25 * (slot % 2)) for slot in range(number)]
    return torch.tensor(colors).view(number, 3)


def _per_pixel(tokens: TokenMap, values: Tensor) -> Tensor:
    """Values of patches, (N,) or (N, 3), at each pixel: (h, w, 1) or (h, w, 3)."""
    rows, columns = tokens.grid
    height, width = tokens.image.shape[0] // rows, tokens.image.shape[1] // columns
    grid = values.reshape(rows, columns, -1)
    return grid.repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)

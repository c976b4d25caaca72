"""The tensor core in plain code, image by image and token by token: the reference of its tests, and their inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from visionzip import CompressedTokens


def tensors(
    batch: int = 2, length: int = 17, *, cls_token: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Random hidden states, scores and keys; in float64 two scores or similarities are never equal by rounding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (batch, length, 6), "scores": (batch, length - cls_token), "keys": (batch, length, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@st.composite
def problems(draw: st.DrawFn, scores: tuple[str, ...] = ("distinct", "quantised", "constant")) -> dict[str, Any]:
    """Arguments of compress_tokens: any sizes and budgets, also beyond the sequence, and scores with ties."""
    cls_token = draw(st.booleans())
    length = draw(st.integers(1 + cls_token, 24))
    problem = tensors(draw(st.integers(1, 3)), length, cls_token=cls_token, seed=draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(scores))
    if kind == "quantised":
        problem["scores"] = problem["scores"].round()
    elif kind == "constant":
        problem["scores"] = torch.full_like(problem["scores"], 0.5)
    return {
        **problem,
        "dominant": draw(st.integers(1, length + 2)),
        "contextual": draw(st.integers(0, length + 2)),
        "cls_token": cls_token,
        "merge": draw(st.sampled_from(["released", "average"])),
    }


def reference(hidden_states: Tensor, scores: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> CompressedTokens:
    """The method as documented, one image after the other and one token after the other."""
    images = [
        reference_image(*image, *args, **kwargs)
        for image in zip(hidden_states, scores.tolist(), keys.tolist(), strict=True)
    ]
    tokens, *indices = zip(*images, strict=True)
    return CompressedTokens(torch.stack(tokens), *(torch.tensor(rows, dtype=torch.int64) for rows in indices))


def reference_image(
    tokens: Tensor,
    scores: list[float],
    keys: list[list[float]],
    dominant: int,
    contextual: int,
    *,
    cls_token: bool = True,
    merge: str = "released",
) -> tuple[Tensor, list[int], list[int], list[int]]:
    length = len(tokens)
    assignment = [-1] * length
    if dominant + contextual >= length:
        return tokens, list(range(length)), [], assignment

    ranked = sorted(range(len(scores)), key=lambda patch: (-scores[patch], patch))
    kept = [0] * cls_token + [patch + cls_token for patch in ranked[: dominant - cls_token]]
    rest = [position for position in range(length) if position not in kept]
    step = max(1, len(rest) // max(1, contextual))
    targets = [rest[slot * step] for slot in range(contextual)]
    for position in rest if targets else []:
        similarities = [cosine(keys[position], keys[target]) for target in targets]
        assignment[position] = similarities.index(max(similarities))  # the first of equals
    for slot, target in enumerate(targets):
        assignment[target] = slot

    merged = []
    for slot, target in enumerate(targets):
        assigned = [tokens[position] for position in rest if assignment[position] == slot and position != target]
        if merge == "average":
            merged.append(sum(assigned, tokens[target]) / (len(assigned) + 1))
        else:
            merged.append(tokens[target] + (sum(assigned) / len(assigned) if assigned else 0))
    return torch.stack([*tokens[sorted(kept)], *merged]), sorted(kept), targets, assignment


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / ((math.hypot(*a) * math.hypot(*b)) or 1)


def assert_same(result: CompressedTokens, expected: CompressedTokens) -> None:
    """Equal indices, and tokens that are equal up to rounding."""
    torch.testing.assert_close(result.tokens, expected.tokens)
    for name in ("dominant_indices", "target_indices", "assignment"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name

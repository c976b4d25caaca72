"""Show the user's own prompts to everything that looks at sequences while ``generate`` runs on shortened prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def show_users_prompt(
    own: dict[str, Any], kwargs: dict[str, Any], prompt: Tensor, length: int
) -> Callable[[Tensor], Tensor]:
    """Let everything that looks at the sequences see the user's prompts (B, L) in place of the shortened ones.

    Returns:
        The function that replaces them, from sequences (B * n, length + new) to (B * n, L + new).
    """

    def shown(ids: Tensor) -> Tensor:
        users = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), dim=0)
        return torch.cat([users, ids[:, length:]], dim=1)

    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _Streamer(kwargs["streamer"], shown)
    for name in ("logits_processor", "stopping_criteria"):
        if own[name] is not None:
            own[name] = [_Shown(each, shown) for each in own[name]]
    if (allowed := own["prefix_allowed_tokens_fn"]) is not None:
        own["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([prompt[row].to(ids.device), ids[length:]])
        )
    return shown


class _Streamer:
    """Show the user's streamer the user's prompt before the answer."""

    def __init__(self, streamer: Any, shown: Callable[[Tensor], Tensor]) -> None:
        self._streamer = streamer
        self._shown: Callable[[Tensor], Tensor] | None = shown

    def put(self, value: Tensor) -> None:
        """Pass the prompts on first, then token by token."""
        shown, self._shown = self._shown, None
        self._streamer.put(value if shown is None else shown(value))

    def end(self) -> None:
        """Pass on that the answer has ended."""
        self._streamer.end()


class _Shown:
    """Show the user's logits processor or stopping criterion sequences with the user's prompt."""

    def __init__(self, inner: Any, shown: Callable[[Tensor], Tensor]) -> None:
        self._inner = inner
        self._shown = shown

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self._inner(self._shown(input_ids), scores)

"""What the page draws: an image with its patches as JSON for ``picture.js``, and the strip of methods as HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from llava.demo.conversation.talk import Answer, Picture, Talk
from llava.demo.drawing.words import seconds


def picture(talk: Talk, data: dict[str, Any] | None, view: str | None = None, layer: int | None = None) -> str:
    """What ``picture.js`` draws, as JSON; empty without an image."""
    if not talk.pictures or data is None:
        return ""
    return json.dumps(
        {
            "images": [{"name": each.upload.name, "url": each.upload.thumbnail} for each in talk.pictures],
            "selected": talk.selected,
            "drawn": talk.drawn,
            "picked": talk.picked,
            "hint": talk.hint,
            "url": talk.pictures[talk.selected].upload.shown,
            "picks": talk.pictures[talk.selected].picks,
            "view": view,
            "layer": layer,
            "data": _rounded(data),
        }
    )


def _rounded(value: Any) -> Any:
    """The same with five digits in each number, half as long."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def strip(shown: Picture, rows: Sequence[tuple[str, dict[str, Any] | None, Answer | str]]) -> str:
    """Kept patches and answer of each method, side by side."""
    cells = []
    for method, data, answer in rows:
        if isinstance(answer, str) or data is None:
            cells.append(f'<li><h3>{escape(method)}</h3><p class="vz-error">{escape(str(answer))}</p></li>')
            continue
        cost = f"{answer.visual_tokens} visual tokens, first in {seconds(answer.first_token)}"
        cells.append(
            f"<li><h3>{escape(method)}</h3>{_kept(shown, method, data)}"
            f'<p class="vz-answer">{escape(answer.turn.text or "(no words)")}</p><p class="vz-cost">{cost}</p></li>'
        )
    return f'<ol class="vz-strip">{"".join(cells)}</ol>' if cells else ""


def _kept(shown: Picture, method: str, data: dict[str, Any]) -> str:
    """The image with the patches darkened that a method does not keep."""
    width, height = data["size"]
    tile = data["tiles"][0]
    role = tile["role"] or ["kept"] * len(tile["rects"])
    shade = {"target": 0.35, "merged": 0.8, "dropped": 0.8}
    dark = "".join(
        f'<rect x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{bottom - top:.2f}" '
        f'fill="#101418" fill-opacity="{shade[fate]}"/>'
        for (left, top, right, bottom), fate in zip(tile["rects"], role, strict=True)
        if fate in shade
    )
    label = f"{role.count('kept')} of {len(role)} patches kept by {method}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f'<image href="{escape(shown.upload.shown)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f"{dark}</svg>"
    )

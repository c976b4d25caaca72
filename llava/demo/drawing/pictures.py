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
            "urls": talk.pictures[talk.selected].upload.shown,
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
    cells: list[str] = []
    drawn = False
    for method, data, answer in rows:
        if isinstance(answer, str) or data is None:
            cells.append(f'<li><h3>{escape(method)}</h3><p class="vz-error">{escape(str(answer))}</p></li>')
            continue
        cost = f"{answer.visual_tokens} visual tokens, first in {seconds(answer.first_token)}"
        cells.append(
            f"<li><h3>{escape(method)}</h3>{_kept(shown, method, data, drawn)}"
            f'<p class="vz-answer">{escape(answer.turn.text or "(no words)")}</p><p class="vz-cost">{cost}</p></li>'
        )
        drawn = True
    return f'<ol class="vz-strip">{"".join(cells)}</ol>' if cells else ""


def _kept(shown: Picture, method: str, data: dict[str, Any], drawn: bool) -> str:
    """The image or the frames, with the patches darkened that a method does not keep.

    Args:
        shown: the image or the video.
        method: its name.
        data: what it keeps.
        drawn: whether the page has the pixels already, which are sent once.
    """
    width, height = data["size"]
    frames = data["frames"] or 1
    figures = []
    for at, tile in enumerate(data["tiles"][:frames]):
        role = tile["role"] or ["kept"] * len(tile["rects"])
        href = f"#vz-strip-{at}"
        pixels = f'<use href="{href}"/>'
        if not drawn:
            url = escape(shown.upload.shown[at])
            size = f'width="{width}" height="{height}" preserveAspectRatio="none"'
            pixels = f'<image id="{href[1:]}" href="{url}" {size}/>'
        name = f"frame {at + 1}: " if data["frames"] else ""
        label = f"{name}{role.count('kept')} of {len(role)} patches kept by {method}"
        inside = pixels + _shades(tile, role)
        figures.append(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>')
    return "".join(figures) if not data["frames"] else f'<div class="vz-small">{"".join(figures)}</div>'


def _shades(tile: dict[str, Any], role: Sequence[str]) -> str:
    """What darkens the patches that are not kept, one path for each kind."""
    shade = {"target": 0.35, "merged": 0.8, "dropped": 0.8}
    found = []
    for dark in sorted(set(shade.values())):
        steps = "".join(
            f"M{left:.6g} {top:.6g}H{right:.6g}V{bottom:.6g}H{left:.6g}z"
            for (left, top, right, bottom), fate in zip(tile["rects"], role, strict=True)
            if shade.get(fate) == dark
        )
        found.append(f'<path d="{steps}" fill="#101418" fill-opacity="{dark}"/>' if steps else "")
    return "".join(found)

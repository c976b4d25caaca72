"""What the page says, as HTML: the conversation, its figures, the strip of methods. What others wrote is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from llava.demo.talk import Answer, Exchange, Picture, Talk

_NAMES = {"vanilla": "All tokens", "zipped": "VisionZip"}
_MISSING, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def status(text: str, error: bool = False, busy: bool = False, waiting: bool = False) -> str:
    """One line on what goes on, or on what went wrong; nothing for no text.

    Args:
        text: the line.
        error: it says what went wrong.
        busy: the model is at work: what the button Stop can end.
        waiting: others have their turn before; gradio's place in the queue stands beside it.
    """
    if not text:
        return ""
    line = escape(" ".join(text.split()))
    if error:
        return f'<p class="vz-error" role="alert">{line}</p>'
    kind = "vz-status" + " vz-busy" * busy + " vz-waiting" * waiting
    return f'<p class="{kind}">{line}</p>'


def conversation(exchanges: Sequence[Exchange]) -> str:
    """All turns, both answers side by side, with what they cost."""
    if not exchanges:
        return '<p class="vz-empty">Both answers will stand here, side by side, with what they cost.</p>'
    return "".join(_exchange(exchange) for exchange in exchanges)


def _exchange(exchange: Exchange) -> str:
    images = "".join(
        f'<img src="{escape(picture.upload.thumbnail)}" alt="{escape(picture.upload.name)}">'
        for picture in exchange.pictures
    )
    sides = "".join(_side(exchange, slot) for slot in _NAMES)
    question = f'<h3 class="vz-question">{escape(exchange.question)}{images}</h3>'
    return f'<section class="vz-turn">{question}<div class="vz-pair">{sides}</div></section>'


def _side(exchange: Exchange, slot: str) -> str:
    answer, partial = exchange.answers.get(slot), exchange.partial.get(slot)
    name = _NAMES[slot] + (f" <small>{escape(exchange.setting)}</small>" if slot == "zipped" else "")
    if answer is not None:
        text, figures = answer.turn.text or "(no words)", _figures(answer, exchange.answers["vanilla"])
    elif partial is not None:
        text, figures = partial or "reading …", ""
    else:
        text, figures = "waiting …", ""
    busy = "" if answer is not None else ' aria-busy="true"'
    return (
        f'<article class="vz-side {slot}"{busy}><h4>{name}</h4><p class="vz-answer">{escape(text)}</p>'
        f"{figures}</article>"
    )


def _figures(answer: Answer, base: Answer) -> str:
    """What an answer cost; with the difference from the vanilla one, unless it is that."""
    rows = [
        ("visual tokens", f"{answer.visual_tokens}", _change(answer.visual_tokens, base.visual_tokens)),
        ("cached tokens", f"{answer.turn.cached_tokens}", _change(answer.turn.cached_tokens, base.turn.cached_tokens)),
        ("first token", _seconds(answer.first_token), _change(answer.first_token, base.first_token)),
        ("tokens/s", f"{answer.speed:.1f}" if answer.speed else _MISSING, _change(answer.speed, base.speed)),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f' <em>{change}</em>' if answer is not base and change else ''}</dd></div>"
        for name, value, change in rows
    )
    return f"<dl>{shown}</dl>"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _change(value: float | None, base: float | None) -> str:
    if not value or not base:
        return ""
    return f"{value / base - 1:+.0%}".replace("-", _MINUS)


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
        cost = f"{answer.visual_tokens} visual tokens, first in {_seconds(answer.first_token)}"
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

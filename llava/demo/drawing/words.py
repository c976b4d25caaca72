"""What the page says, as HTML: the line on its state, the conversation and its figures. Foreign words are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llava.demo.conversation.talk import Answer, Exchange

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
    if slot in exchange.refused:
        line = f'<p class="vz-error">{escape(exchange.refused[slot])}</p>'
        return f'<article class="vz-side {slot}"><h4>{_NAMES[slot]}</h4>{line}</article>'
    answer, partial = exchange.answers.get(slot), exchange.partial.get(slot)
    name = _NAMES[slot] + (f" <small>{escape(exchange.setting)}</small>" if slot == "zipped" else "")
    if answer is not None:
        text, figures = answer.turn.text or "(no words)", _figures(answer, exchange)
    elif partial is not None:
        text, figures = partial or "reading …", ""
    else:
        text, figures = "waiting …", ""
    busy = "" if answer is not None else ' aria-busy="true"'
    return (
        f'<article class="vz-side {slot}"{busy}><h4>{name}</h4><p class="vz-answer">{escape(text)}</p>'
        f"{figures}</article>"
    )


def _figures(answer: Answer, exchange: Exchange) -> str:
    """What an answer cost; with the difference from the vanilla one, unless it is that or there is none."""
    base = exchange.answers.get("vanilla", answer)
    rows = [
        ("visual tokens", f"{answer.visual_tokens}", _change(answer.visual_tokens, base.visual_tokens)),
        ("cached tokens", f"{answer.turn.cached_tokens}", _change(answer.turn.cached_tokens, base.turn.cached_tokens)),
        ("first token", seconds(answer.first_token), _change(answer.first_token, base.first_token)),
        ("tokens/s", f"{answer.speed:.1f}" if answer.speed else _MISSING, _change(answer.speed, base.speed)),
    ]
    if frames := exchange.frames:
        of_frame, of_base = answer.turn.visual_tokens // frames, base.turn.visual_tokens // frames
        rows.insert(0, ("per frame", f"{of_frame}", _change(of_frame, of_base)))
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f' <em>{change}</em>' if answer is not base and change else ''}</dd></div>"
        for name, value, change in rows
    )
    return f"<dl>{shown}</dl>"


def seconds(value: float) -> str:
    """A time, in the unit that it is read best in."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _change(value: float | None, base: float | None) -> str:
    if not value or not base:
        return ""
    return f"{value / base - 1:+.0%}".replace("-", _MINUS)

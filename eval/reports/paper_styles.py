"""The forms in which a table of the paper is written."""

from __future__ import annotations

import re

MISSING = "\N{EN DASH}"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "‡": r"$\ddagger$",
    "†": r"$\dagger$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    MISSING: "--",
}


def markdown(number: int, title: str, header: list[str], groups: list[list[list[str]]], remarks: list[str]) -> str:
    """A table of the paper as markdown.

    Args:
        number: the paper's.
        title: the paper's.
        header: names of the columns: tokens, method, which figures, and the figures.
        groups: of each row of the paper its lines, cell by cell.
        remarks: what stands below.
    """
    rule = ["---:", "---", "---", *["---:"] * (len(header) - 3)]
    lines = [header, rule, *(line for group in groups for line in group)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### Table {number}: {title}\n\n{body}\n\n" + "".join(f"- {remark}\n" for remark in remarks)


def latex(number: int, title: str, header: list[str], groups: list[list[list[str]]], remarks: list[str]) -> str:
    """The same for LaTeX, with ``booktabs``; arguments as for :func:`markdown`."""

    def line(cells: list[str]) -> str:
        return " & ".join(map(_escape, cells)).rstrip() + r" \\"

    body = "\n\\midrule\n".join("\n".join(map(line, group)) for group in groups)
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\caption{{Table {number} of the VisionZip paper: {_escape(title)}. "
            rf"{' '.join(map(_escape, remarks))}}}",
            rf"\begin{{tabular}}{{rll{'r' * (len(header) - 3)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escape(text: str) -> str:
    """Text for LaTeX; a signed number in mathematics, for its minus."""
    if re.fullmatch(r"[+-]\d+\.\d", text):
        return f"${text}$"
    return "".join(_LATEX.get(letter, letter) for letter in text)


STYLES = {"markdown": markdown, "latex": latex}

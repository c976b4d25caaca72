"""Griffe's extension: names that a docstring marks by a role, as in ``:func:`unzip```, link to their docstrings."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([\w.]+)`")


class Roles(Extension):
    """Writes links in the place of roles; a name that the reference does not have stays code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: Object, name: str) -> str:
    try:
        path = obj.resolve(name)
    except NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name.rpartition(".")[2]}</code></autoref>'

"""Tables and texts in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown.

    >>> print(table(["key", "default"], [["a|b", "`1|2`"]]))
    | key | default |
    |---|---|
    | a\\|b | `1|2` |
    <BLANKLINE>
    """
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    # A bar in code ends no cell, and a backslash before it would be seen.
    parts = re.split(r"(`+[^`]+`+)", " ".join(str(value).split()))
    return "".join(part if number % 2 else part.replace("|", "\\|") for number, part in enumerate(parts))


def code(text: object) -> str:
    """Text in the font of code, whatever is in it."""
    return f"`` {text} ``" if "`" in str(text) else f"`{text}`"


def plain(text: str) -> str:
    """Text that is not Markdown, so that nothing in it is taken for markup; what it has in backticks stays code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_{}\[\]#<>~])", r"\\\1", text)

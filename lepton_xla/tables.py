"""Tables that fit any width: names may wrap, numbers are never cut.

In a pipe a table has its natural width. On a narrow terminal names wrap. If that is not enough, each row becomes a
paragraph with one line per column.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

# Minimum width of a column that wraps.
_LEAST = 10
_GAP = "  "
# A word that is too long for its column wraps after one of these.
_BREAKS = "/,;:=.-_"


def printable(value: Any) -> str:
    """Replace characters that could control a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: line above the table; may be empty.
        columns: headings, of one or more lines; `>` in front marks a right-aligned column of numbers.
        rows: the cells of each row, one per column.
        total: the last row, below a line; may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    total: Sequence[Any] = ()

    def lines(self, width: int | None = None, *, rule: str = "\N{BOX DRAWINGS LIGHT HORIZONTAL}") -> list[str]:
        """The lines below the title, at most `width` wide unless a number or its heading is wider.

        Args:
            width: columns of the terminal; None for no limit.
            rule: character for horizontal lines.
        """
        right = [column.startswith(">") for column in self.columns]
        headings = ["\n".join(map(printable, column.removeprefix(">").split("\n"))) for column in self.columns]
        rows = [[printable(cell) for cell in row] for row in self.rows]
        total = [printable(cell) for cell in self.total]
        body = [*rows, *([total] if total else [])]
        for row in body:
            if len(row) != len(headings):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(headings)} columns: {row}")
        natural = [
            max(len(line) for line in (*heading.split("\n"), *(row[k] for row in body)))
            for k, heading in enumerate(headings)
        ]
        widths = _fitted(natural, right, width)
        if widths is None:
            return _paragraphs(headings, body)
        ruled = rule * (sum(widths) + len(_GAP) * (len(widths) - 1))
        drawn = [*_row(headings, widths, right, bottom=True), ruled]
        for row in rows:
            drawn += _row(row, widths, right)
        return [*drawn, *([ruled, *_row(total, widths, right)] if total else [])]


def _fitted(natural: Sequence[int], right: Sequence[bool], width: int | None) -> list[int] | None:
    """Widths of the columns; None if names would have to wrap to less than `_LEAST`."""
    widths = [size if figures else min(size, _LEAST) for size, figures in zip(natural, right, strict=True)]
    left = (width if width is not None else 10**9) - sum(widths) - len(_GAP) * (len(widths) - 1)
    if left < 0:
        return None
    # Distribute the rest among the names; in equal parts if it does not suffice.
    wanting = sorted((size - widths[k], k) for k, size in enumerate(natural))
    for place, (more, k) in enumerate(wanting):
        given = min(more, left // (len(wanting) - place))
        widths[k] += given
        left -= given
    return widths


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], *, bottom: bool = False) -> list[str]:
    """The lines of one row; `bottom` aligns shorter cells at the bottom."""
    folded = [
        [line for part in cell.split("\n") for line in fold(part, size)]
        for cell, size in zip(cells, widths, strict=True)
    ]
    height = max(map(len, folded))
    padded = [[""] * (height - len(lines)) + lines if bottom else lines for lines in folded]
    return [
        _GAP.join(
            line.rjust(size) if figures else line.ljust(size)
            for line, size, figures in zip(parts, widths, right, strict=True)
        ).rstrip()
        for parts in itertools.zip_longest(*padded, fillvalue="")
    ]


def _paragraphs(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as its first cell, then a line for every other non-empty cell."""
    names = [" ".join(heading.split()) for heading in headings]
    wide = max((len(name) for name in names[1:]), default=0)
    drawn: list[str] = []
    for row in rows:
        drawn.append(f"{names[0]} {row[0]}".strip())
        drawn += [f"  {name.ljust(wide)}  {cell}" for name, cell in zip(names[1:], row[1:], strict=True) if cell]
    return drawn


def fold(text: str, width: int) -> list[str]:
    """Wrap text to lines of at most `width` characters, at spaces or else after punctuation; at least one line.

    >>> fold("layers/3/attention/query kernel", 16)
    ['layers/3/', 'attention/query', 'kernel']
    """
    lines: list[str] = []
    rest = text
    while len(rest) > width:
        at = rest.rfind(" ", 0, width + 1)
        if at <= 0:
            at = max(rest.rfind(mark, 0, width) for mark in _BREAKS) + 1
        at = at if at > width // 3 else width
        lines.append(rest[:at].rstrip())
        rest = rest[at:].lstrip(" ")
    return [*lines, rest]


def size(size_bytes: float) -> str:
    """Format bytes for people.

    >>> [size(number) for number in (512, 46_000, 8_300_000)]
    ['512 B', '46.0 kB', '8.30 MB']
    """
    return short(size_bytes, "B")


def short(number: float, unit: str = "") -> str:
    """Format a number with three digits and a decimal prefix."""
    value, prefix = float(number), ""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            break
        value /= 1000
    digits = f"{value:#.3g}".rstrip(".") if prefix else f"{value:.0f}"
    return f"{digits} {prefix}{unit}".rstrip()

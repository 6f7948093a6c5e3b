"""HTML pages that load nothing: the frame, escaped text, tables, and positions on an axis."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;max-width:100%;overflow-x:auto}"
    "td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}"
    "pre{background:#f5f5f5;padding:.6rem;overflow:auto}svg{max-width:100%;height:auto}tr.best{background:#eaf4ea}"
    "h1{overflow-wrap:anywhere}"
    "@media(max-width:45rem){h1{font-size:1.4rem}td,th{white-space:nowrap}svg.wide text{font-size:1.5em}}"
)


def document(title: str, parts: Sequence[str]) -> str:
    """A page with a title, of parts that are HTML already.

    >>> "<title>a &lt; b</title>" in document("a < b", ["<p>less</p>"])
    True
    """
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    head += f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escaped(title)}</title>'
    return f"{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def escaped(value: object) -> str:
    """Text as HTML."""
    return html.escape(str(value))


def drawn_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """A table whose first columns are texts and whose others are numbers.

    Args:
        headings: of the columns.
        rows: their cells.
        texts: how many columns are texts.

    >>> drawn_table(["class", "rows"], [["<0>", "3"]])
    '<table><tr><th>class</th><th>rows</th></tr><tr><td>&lt;0&gt;</td><td class="n">3</td></tr></table>'
    """
    head = "".join(f"<th>{escaped(each)}</th>" for each in headings)
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td>{escaped(cell)}</td>" if place < texts else f'<td class="n">{escaped(cell)}</td>'
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def scaled(values: Sequence[float], low: float, high: float) -> list[float]:
    """Positions between `low` and `high`: the smallest value at `low`, the greatest at `high`.

    >>> scaled([1.0, 2.0, 5.0], 0, 100)
    [0.0, 25.0, 100.0]
    """
    least, span = min(values), max(values) - min(values)
    return [low + (high - low) * ((value - least) / span if span else 0.5) for value in values]

"""The end of every application: its figures beside their aims, in build/apps/summary.json and on a page of its own."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_xla.documents import document, drawn_table, escaped, scaled

type Aims = Mapping[str, tuple[str, float]]
"""Figure -> `>=` or `<=`, and a bound."""

_WIDE, _HIGH, _MARGIN = 640, 220, 44
_COLORS = ("#3b6ea5", "#b5651d", "#2a7d2e")


def folder() -> pathlib.Path:
    """Where applications write: `LEPTON_APPS`, or build/apps."""
    return pathlib.Path(
        os.environ.get("LEPTON_APPS", pathlib.Path(__file__).resolve().parent.parent.parent / "build" / "apps")
    )


def medians(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each figure of several seeds."""
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def met(figures: Mapping[str, Any], aims: Aims) -> dict[str, bool]:
    """Which aims are met."""
    return {
        name: figures[name] >= bound if sign == ">=" else figures[name] <= bound for name, (sign, bound) in aims.items()
    }


def exit_code(figures: Mapping[str, Any], aims: Aims) -> int:
    """1 if an aim is missed; 0 if all are met, or what was done was too little for them (`--quick`)."""
    return int(not (figures["quick"] or all(met(figures, aims).values())))


def write(app: str, figures: Mapping[str, Any], aims: Aims, parts: Sequence[str] = ()) -> bool:
    """Print figures beside their aims, add them to the summary, and write the page `APP/report.html`.

    Args:
        app: name of the application.
        figures: what was measured.
        aims: what some of them should be.
        parts: of the page, HTML, behind the table of the aims.

    Returns:
        Whether all aims are met.
    """
    reached = met(figures, aims)
    for name, (sign, bound) in aims.items():
        print(f"  {name:<28}{figures[name]:10.4f}   aim {sign} {bound:g}: {'met' if reached[name] else 'MISSED'}")
    file = folder() / "summary.json"
    (folder() / app).mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    known[app] = {**figures, "aims": {name: [*aim, reached[name]] for name, aim in aims.items()}}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(part, file)
    rows = [
        [name.replace("_", " "), f"{figures[name]:.4f}", f"{sign} {bound:g}", "met" if reached[name] else "MISSED"]
        for name, (sign, bound) in aims.items()
    ]
    little = "<p><strong>A quick run, on little: its figures say only that all steps work.</strong></p>"
    head = [f"<h1>{escaped(app)}</h1>", *([little] if figures.get("quick") else []), "<h2>Aims</h2>"]
    head.append(drawn_table(["figure", "measured", "aim", ""], rows))
    (folder() / app / "report.html").write_text(document(app, [*head, *parts]))
    return all(reached.values())


def body(file: pathlib.Path) -> str:
    """What is on a page that `leptonx eval` or `leptonx tune` wrote, its headings a step smaller."""
    text = file.read_text().partition("<body>")[2].rpartition("</body>")[0]
    for size in (3, 2, 1):
        text = text.replace(f"<h{size}>", f"<h{size + 1}>").replace(f"</h{size}>", f"</h{size + 1}>")
    return text


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    marks: Mapping[str, float] | None = None,
    level: tuple[str, float] | None = None,
) -> str:
    """Draw curves over one axis, from 0 to the greatest value.

    Args:
        curves: name -> points.
        across: what the axis is.
        marks: name -> where something happens, as a dashed line.
        level: name and height of a line, such as of an alert.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    marks = marks or {}
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top = max([y for _, y in points] + ([level[1]] if level else []))

    def at(x: float) -> float:
        return scaled([left, right, x], _MARGIN, _WIDE - 20)[2]

    def up(y: float) -> float:
        return scaled([0.0, top, y], _HIGH - _MARGIN, 24)[2]

    drawn = [f'<path d="M{_MARGIN} 24V{_HIGH - _MARGIN}H{_WIDE - 20}" fill="none" stroke="#888"/>']
    for (_, curve), color in zip(curves.items(), _COLORS * len(curves), strict=False):
        path = "".join(f"{'L' if k else 'M'}{at(x):.1f} {up(y):.1f}" for k, (x, y) in enumerate(curve))
        drawn.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
    for place, (name, x) in enumerate(marks.items()):
        drawn.append(f'<path d="M{at(x):.1f} 24V{_HIGH - _MARGIN}" stroke="#999" stroke-dasharray="4"/>')
        drawn.append(f'<text x="{at(x) + 3:.1f}" y="{36 + 14 * place}" font-size="12">{escaped(name)}</text>')
    if level:
        drawn.append(f'<path d="M{_MARGIN} {up(level[1]):.1f}H{_WIDE - 20}" stroke="#b03030" stroke-dasharray="2"/>')
    drawn += [
        f'<text x="4" y="18" font-size="12">{top:.3g}</text>',
        f'<text x="4" y="{_HIGH - _MARGIN}" font-size="12">0</text>',
        f'<text x="{_MARGIN}" y="{_HIGH - 24}" font-size="12">{left:.4g}</text>',
        f'<text x="{_WIDE - 20}" y="{_HIGH - 24}" text-anchor="end" font-size="12">{right:.4g}</text>',
        f'<text x="{_WIDE / 2}" y="{_HIGH - 8}" text-anchor="middle" font-size="12">{escaped(across)}</text>',
    ]
    names = [
        f'<span style="color:{color}">{escaped(n)}</span>'
        for n, color in zip(curves, _COLORS * len(curves), strict=False)
    ]
    names += [f'<span style="color:#b03030">{escaped(level[0])}: {level[1]:g}</span>'] if level else []
    svg = f'<svg viewBox="0 0 {_WIDE} {_HIGH}" width="{_WIDE}" role="img">{"".join(drawn)}</svg>'
    return f"{svg}<p>{', '.join(names)}</p>"

"""One HTML page about a comparison: metrics, calibration, and what each class lost. It loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lepton_xla.documents import document, drawn_table, escaped
from lepton_xla.evaluation.comparing import Comparison, Side
from lepton_xla.evaluation.figures import NAMES

_SIZE, _MARGIN = 300, 40
# Confusion is drawn up to this many classes, and named by its worst pairs beyond.
_MOST_CLASSES = 30
_METHODS = (
    "Intervals cover 95 %. Of the accuracy they are Wilson's, and of its difference Newcombe's for paired answers; all "
    "others are percentiles of a bootstrap of the rows, the same resamples for every model. Recall, precision, F1 and "
    "AUC are means over classes."
)
_COLORS = ("#888", "#3b6ea5", "#2a7d2e", "#b5651d", "#7b3f9e")


def page(title: str, found: Comparison) -> str:
    """Write the page.

    >>> from lepton_xla.evaluation import compare, page
    >>> models = {"<float>": lambda x: {"y": x}, "small": lambda x: {"y": -x}}
    >>> text = page("digits", compare(models, {"x": np.eye(3, dtype=np.float32)}, np.arange(3)))
    >>> "&lt;float&gt;" in text, "<float>" in text, "//" in text
    (True, False, False)
    """
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f"<p>{found.rows:,} rows; output {escaped(found.output)}. {_METHODS}</p>",
        "<h2>Metrics</h2>",
        _metrics(found.sides),
        "<h2>Time and size</h2>",
        _costs(found.sides),
        "<h2>Calibration</h2>",
        _calibration(found.sides),
    ]
    for side in found.sides[1:]:
        parts += [
            f"<h2>What classes lost: {escaped(side.name)} against {escaped(found.sides[0].name)}</h2>",
            _dumbbells(side),
            _damage(side),
        ]
    for side in found.sides:
        parts += [f"<h2>Confusion: {escaped(side.name)}</h2>", _confusion(side)]
    return document(title, parts)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def _metrics(sides: Sequence[Side]) -> str:
    rows: list[list[str]] = []
    for name in NAMES:
        for side in sides:
            interval, (difference, paired) = side.intervals.get(name), side.differences.get(name, (math.nan, None))
            change = f"{difference:+.4f}" if math.isfinite(difference) else ""
            rows.append(
                [
                    name.replace("_", " "),
                    side.name,
                    _number(side.figures.metrics[name]),
                    str(interval or ""),
                    change + (f" ({paired.low:+.4f} to {paired.high:+.4f})" if paired is not None else ""),
                ]
            )
    return drawn_table(["metric", "model", "value", "interval", "difference"], rows, texts=2)


def _costs(sides: Sequence[Side]) -> str:
    sizes = list(sides[0].latency)
    kinds = list(dict.fromkeys(name for side in sides for name in side.resources))
    head = ["model", *(f"{size} row{'s' * (size > 1)}, ms (p99)" for size in sizes), "processor us a row", *kinds]
    rows = [
        [
            side.name,
            *(f"{side.latency[size][0] * 1e3:.3f} ({side.latency[size][1] * 1e3:.3f})" for size in sizes),
            f"{side.cpu_s * 1e6:.1f}",
            *(f"{side.resources[kind]:,.0f}" if kind in side.resources else "" for kind in kinds),
        ]
        for side in sides
    ]
    return drawn_table([each.replace("_", " ") for each in head], rows)


def _calibration(sides: Sequence[Side]) -> str:
    """Accuracy over confidence; a calibrated model is on the diagonal."""
    span = _SIZE - 2 * _MARGIN
    drawn = [f'<path d="M{_MARGIN} {_SIZE - _MARGIN}L{_SIZE - _MARGIN} {_MARGIN}" stroke="#ccc"/>']
    legend: list[str] = []
    for side, color in zip(sides, _COLORS * len(sides), strict=False):
        known = [(mean, right, rows) for rows, mean, right in side.figures.bins if rows]
        points = [(_MARGIN + span * mean, _SIZE - _MARGIN - span * right, rows) for mean, right, rows in known]
        path = "".join(f"{'L' if k else 'M'}{x:.1f} {y:.1f}" for k, (x, y, _) in enumerate(points))
        drawn.append(f'<path d="{path}" fill="none" stroke="{color}"/>')
        drawn += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{escaped(side.name)}: {rows:.0f} rows'
            "</title></circle>"
            for x, y, rows in points
        ]
        legend.append(f'<span style="color:{color}">{escaped(side.name)}</span>')
    ends = (
        f'<text x="{_SIZE / 2}" y="{_SIZE - 8}" text-anchor="middle">confidence</text>'
        f'<text x="4" y="{_MARGIN - 12}">accuracy</text>'
    )
    svg = f'<svg viewBox="0 0 {_SIZE} {_SIZE}" width="{_SIZE}" role="img">{"".join(drawn)}{ends}</svg>'
    return f"{svg}<p>{', '.join(legend)}. Below the diagonal a model is too sure.</p>"


def _dumbbells(side: Side) -> str:
    """Recall of each class before and after, the greatest loss first."""
    shown = side.damage[:_MOST_CLASSES]
    high, wide, left = 18, 520, 90
    values = [each for one in shown for each in (one.before, one.after)]
    least = min(0.9, *values) if values else 0.0

    def across(value: float) -> float:
        return left + (wide - left - 20) * (value - least) / (1 - least if least < 1 else 1)

    drawn: list[str] = []
    for place, each in enumerate(shown):
        y = 14 + high * place
        color = "#b03030" if each.difference < 0 else "#2a7d2e"
        one, two = across(each.before), across(each.after)
        said = f"class {each.label}: {each.before:.3f} to {each.after:.3f}, {each.rows} rows"
        drawn.append(
            f'<g><title>{escaped(said)}</title><text x="4" y="{y + 4}">{each.label}{" *" * each.surely}</text>'
            f'<path d="M{one:.1f} {y}H{two:.1f}" stroke="{color}" stroke-width="3"/>'
            f'<circle cx="{one:.1f}" cy="{y}" r="4" fill="#888"/><circle cx="{two:.1f}" cy="{y}" r="4" '
            f'fill="{color}"/></g>'
        )
    height = high * len(shown) + 10
    more = f" The {len(shown)} that lost most of {len(side.damage)}." if len(side.damage) > len(shown) else ""
    return (
        f'<svg viewBox="0 0 {wide} {height}" width="{wide}" role="img">{"".join(drawn)}</svg>'
        f"<p>Recall from {least:.2f} to 1; grey before, coloured after. *: lost by more than chance.{more}</p>"
    )


def _damage(side: Side) -> str:
    rows = [
        [
            str(each.label),
            f"{each.rows}",
            _number(each.before),
            _number(each.after),
            f"{each.difference:+.4f} ({each.interval.low:+.4f} to {each.interval.high:+.4f})",
            f"{each.lost}",
            f"{each.gained}",
            f"{each.chance:.2g}",
        ]
        for each in side.damage
    ]
    head = ["class", "rows", "recall before", "after", "difference", "rows lost", "rows gained", "chance (Holm)"]
    return drawn_table(head, rows)


def _confusion(side: Side) -> str:
    table = side.figures.confusion
    classes = len(table)
    if classes > _MOST_CLASSES:
        wrong = table - np.diag(np.diag(table))
        places = np.argsort(wrong, axis=None)[::-1][:20]
        pairs = [divmod(int(place), classes) for place in places]
        rows = [[str(right), str(said), str(wrong[right, said])] for right, said in pairs if wrong[right, said]]
        return drawn_table(["right class", "predicted", "rows"], rows, texts=2)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    head = "".join(f"<th>{k}</th>" for k in range(classes))
    lines = "".join(
        f"<tr><th>{right}</th>"
        + "".join(
            f'<td class="n" style="background:rgba({"42,125,46" if right == said else "176,48,48"},'
            f'{shares[right, said]:.2f})">{table[right, said] or ""}</td>'
            for said in range(classes)
        )
        + "</tr>"
        for right in range(classes)
    )
    return f"<table><tr><th>right \\ predicted</th>{head}</tr>{lines}</table>"

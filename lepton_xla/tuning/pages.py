"""One HTML page about what `tune` found: a plot, a table, and what each weight became. It loads nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from lepton_xla.tables import size
from lepton_xla.tuning.results import Tuning
from lepton_xla.tuning.trials import Trial

_WIDTH, _HEIGHT, _MARGIN = 720, 380, 60
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;"
    "text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    "pre{background:#f5f5f5;padding:.6rem;overflow:auto}svg{max-width:100%}tr.best{background:#eaf4ea}"
)


def page(target: str, found: Tuning) -> str:
    """Write the page.

    >>> from lepton_xla.tuning import Constraints, Trial, Tuning
    >>> trial = Trial("small", "", "chosen", {"dense/<kernel>": "int8"}, {"accuracy": 0.9}, 0.1, None, 0.01, 100, 200)
    >>> found = Tuning(Constraints(0.5), "bytes", "accuracy", {"accuracy": 0.9}, 400, trial, trial, (trial,))
    >>> text = page("m.py:model", found)
    >>> "dense/&lt;kernel&gt;" in text, "//" in text
    (True, False)
    """
    title = f"{target}: recipes within constraints"
    asked = ", ".join(f"{key} = {value:g}" for key, value in vars(found.constraints).items() if value is not None)
    said = [
        f"Objective: {found.objective}. Constraints: {asked or 'none'}.",
        f"Metric: {found.metric}, {found.float_metrics.get(found.metric, math.nan):.6g} in float.",
        f"The float model takes {size(found.float_bytes)} on disk.",
        f"Ended: {found.stopped}, after {found.seconds:.0f} s.",
    ]
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(' '.join(said))}</p>",
        "<h2>Drop and size</h2>",
        _plot(found),
        "<h2>Measured</h2>",
        _table(found),
        "<h2>What each weight became</h2>",
        _sites(found),
        "<h2>Recipes on the frontier</h2>",
        *(f"<h3>{_text(trial.name)}</h3><pre>{_text(trial.recipe)}</pre>" for trial in found.frontier),
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
    return f"{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _plot(found: Tuning) -> str:
    """Bytes across, on a logarithmic axis; the drop upwards."""
    trials = [trial for trial in found.trials if not trial.failure]
    if not trials:
        return "<p>Nothing was measured.</p>"
    sizes = [math.log10(max(trial.bytes, 1)) for trial in trials]
    drops = [trial.judged for trial in trials]
    across = _scaled(sizes, _MARGIN, _WIDTH - _MARGIN)
    up = _scaled(drops, _HEIGHT - _MARGIN, _MARGIN)
    frontier = {trial.name for trial in found.frontier}
    marks: list[str] = []
    for trial, x, y in zip(trials, across, up, strict=True):
        is_best = found.best is not None and trial.name == found.best.name
        color = "#2a7d2e" if is_best else "#3b6ea5" if trial.name in frontier else "#bbb"
        said = f"{trial.name}: {size(trial.bytes)}, {trial.judged:+.2f} points, {trial.latency:.2f} of float's time"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{color}"><title>{_text(said)}</title></circle>')
    largest = _text(size(int(10 ** max(sizes))))
    ends = [
        f'<text x="{_MARGIN}" y="{_HEIGHT - 20}">{_text(size(int(10 ** min(sizes))))}</text>',
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 20}" text-anchor="end">{largest} on disk</text>',
        f'<text x="4" y="{_HEIGHT - _MARGIN}">{min(drops):+.2f}</text>',
        f'<text x="4" y="{_MARGIN - 20}">{max(drops):+.2f} points lost</text>',
    ]
    axes = f'<path d="M{_MARGIN - 12} 30V{_HEIGHT - 44}H{_WIDTH - 30}" fill="none" stroke="#888"/>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{axes}{"".join(marks + ends)}</svg>'
        "<p>Green: the best. Blue: no other is better in drop, bytes and time at once. Grey: the rest.</p>"
    )


def _scaled(values: Sequence[float], low: float, high: float) -> list[float]:
    least, span = min(values), max(values) - min(values)
    return [low + (high - low) * ((value - least) / span if span else 0.5) for value in values]


def _table(found: Tuning) -> str:
    head = ["recipe", "from", found.metric, "drop, chosen by", "drop on rows held back", "on disk", "in memory", "time"]
    rows = "".join(_row(trial, found) for trial in found.trials)
    return f"<table><tr>{''.join(f'<th>{_text(each)}</th>' for each in head)}</tr>{rows}</table>"


def _row(trial: Trial, found: Tuning) -> str:
    is_best = found.best is not None and trial.name == found.best.name
    start = f'<tr class="best"><td>{_text(trial.name)}' if is_best else f"<tr><td>{_text(trial.name)}"
    start += f"</td><td>{_text(trial.origin)}</td>"
    if trial.failure:
        return f'{start}<td colspan="6">failed: {_text(trial.failure)}</td></tr>'
    cells = (
        f"{trial.metrics.get(found.metric, math.nan):.6g}",
        f"{trial.judged:+.2f}",
        str(trial.reported),
        size(trial.bytes),
        size(trial.memory),
        f"{trial.latency:.2f}",
    )
    return start + "".join(f'<td class="n">{_text(cell)}</td>' for cell in cells) + "</tr>"


def _sites(found: Tuning) -> str:
    points = [found.best, *found.frontier] if found.best is not None else found.frontier
    shown = list({trial.name: trial for trial in points if trial.choices}.values())
    if not shown:
        return "<p>Only presets were measured.</p>"
    sites = list(dict.fromkeys(site for trial in shown for site in trial.choices))
    head = "".join(f"<th>{_text(trial.name)}</th>" for trial in shown)
    rows = "".join(
        f"<tr><td>{_text(site)}</td>{''.join(f'<td>{_text(trial.choices.get(site, ""))}</td>' for trial in shown)}</tr>"
        for site in sites
    )
    return f"<table><tr><th>site</th>{head}</tr>{rows}</table>"

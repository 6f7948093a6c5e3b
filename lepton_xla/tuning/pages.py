"""One HTML page about what `tune` found: a plot, a table, and what each weight became. It loads nothing."""

from __future__ import annotations

import math

from lepton_xla.documents import document, drawn_table, escaped, scaled
from lepton_xla.tables import short, size
from lepton_xla.tuning.results import Tuning
from lepton_xla.tuning.trials import Trial

_WIDTH, _HEIGHT, _MARGIN = 720, 380, 60


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
    asked = ", ".join(f"{key} = {value}" for key, value in found.constraints.given().items())
    said = [
        f"Objective: {found.objective}. Constraints: {asked or 'none'}.",
        f"Metric: {found.metric}, {found.float_metrics.get(found.metric, math.nan):.6g} in float.",
        f"The float model takes {size(found.float_bytes)} on disk.",
        *([f"A call of it takes {short(found.float_operations)} multiply-adds."] if found.float_operations else []),
        f"Ended: {found.stopped}, after {found.seconds:.0f} s.",
    ]
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f"<p>{escaped(' '.join(said))}</p>",
        "<h2>Drop and size</h2>",
        _plot(found),
        "<h2>Measured</h2>",
        _table(found),
        "<h2>What each weight became</h2>",
        _sites(found),
        "<h2>Recipes on the frontier</h2>",
        *(f"<h3>{escaped(trial.name)}</h3><pre>{escaped(trial.recipe)}</pre>" for trial in found.frontier),
    ]
    return document(title, parts)


def _plot(found: Tuning) -> str:
    """Bytes across, on a logarithmic axis; the drop upwards."""
    trials = [trial for trial in found.trials if not trial.failure]
    if not trials:
        return "<p>Nothing was measured.</p>"
    sizes = [math.log10(max(trial.bytes, 1)) for trial in trials]
    drops = [trial.judged for trial in trials]
    across = scaled(sizes, _MARGIN, _WIDTH - _MARGIN)
    up = scaled(drops, _HEIGHT - _MARGIN, _MARGIN)
    frontier = {trial.name for trial in found.frontier}
    marks: list[str] = []
    for trial, x, y in zip(trials, across, up, strict=True):
        is_best = found.best is not None and trial.name == found.best.name
        color = "#2a7d2e" if is_best else "#3b6ea5" if trial.name in frontier else "#bbb"
        said = f"{trial.name}: {size(trial.bytes)}, {trial.judged:+.2f} points, {trial.latency:.2f} of float's time"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{color}"><title>{escaped(said)}</title></circle>')
    largest = escaped(size(int(10 ** max(sizes))))
    ends = [
        f'<text x="{_MARGIN}" y="{_HEIGHT - 20}">{escaped(size(int(10 ** min(sizes))))}</text>',
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 20}" text-anchor="end">{largest} on disk</text>',
        f'<text x="4" y="{_HEIGHT - _MARGIN}">{min(drops):+.2f}</text>',
        f'<text x="4" y="{_MARGIN - 20}">{max(drops):+.2f} points lost</text>',
    ]
    axes = f'<path d="M{_MARGIN - 12} 30V{_HEIGHT - 44}H{_WIDTH - 30}" fill="none" stroke="#888"/>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{axes}{"".join(marks + ends)}</svg>'
        "<p>Green: the best. Blue: no other is better in drop, bytes and time at once. Grey: the rest.</p>"
    )


def _table(found: Tuning) -> str:
    head = [
        "recipe", "from", found.metric, "drop, chosen by", "drop on rows held back", "on disk", "in memory",
        "multiply-adds", "time",
    ]  # fmt: skip
    rows = "".join(_row(trial, found) for trial in found.trials)
    return f"<table><tr>{''.join(f'<th>{escaped(each)}</th>' for each in head)}</tr>{rows}</table>"


def _row(trial: Trial, found: Tuning) -> str:
    is_best = found.best is not None and trial.name == found.best.name
    start = f'<tr class="best"><td>{escaped(trial.name)}' if is_best else f"<tr><td>{escaped(trial.name)}"
    start += f"</td><td>{escaped(trial.origin)}</td>"
    if trial.failure:
        return f'{start}<td colspan="7">failed: {escaped(trial.failure)}</td></tr>'
    cells = (
        f"{trial.metrics.get(found.metric, math.nan):.6g}",
        f"{trial.judged:+.2f}",
        str(trial.reported),
        size(trial.bytes),
        size(trial.memory),
        short(trial.operations),
        f"{trial.latency:.2f}",
    )
    return start + "".join(f'<td class="n">{escaped(cell)}</td>' for cell in cells) + "</tr>"


def _sites(found: Tuning) -> str:
    points = [found.best, *found.frontier] if found.best is not None else found.frontier
    shown = list({trial.name: trial for trial in points if trial.choices}.values())
    if not shown:
        return "<p>Only presets were measured.</p>"
    sites = list(dict.fromkeys(site for trial in shown for site in trial.choices))
    rows = [[site, *(trial.choices.get(site, "") for trial in shown)] for site in sites]
    return drawn_table(["site", *(trial.name for trial in shown)], rows, texts=len(shown) + 1)

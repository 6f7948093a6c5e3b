"""One HTML page about what `tune` found: a plot, a table, and what each weight became. It loads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from lepton_xla.documents import document, drawn_table, escaped, scaled
from lepton_xla.tables import short, size
from lepton_xla.tuning.constraints import OBJECTIVES
from lepton_xla.tuning.results import Tuning
from lepton_xla.tuning.summaries import summary
from lepton_xla.tuning.trials import Trial

_WIDTH, _HEIGHT, _MARGIN = 720, 380, 84


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
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f"<p>{'<br>'.join(map(escaped, summary(found)))}</p>",
        "<h2>Drop and size</h2>",
        _plot(found, "on disk", lambda trial: trial.bytes, lambda value: size(round(value))),
        "<h2>Drop and time</h2>",
        _plot(found, "of float's time", lambda trial: trial.latency, lambda value: f"{value:.2f}"),
        f"<p>{escaped(_legend(found))}</p>",
        "<h2>Measured</h2>",
        _table(found),
        "<h2>What each weight became</h2>",
        _sites(found),
        "<h2>Recipes on the frontier</h2>",
        *(f"<h3>{escaped(trial.name)}</h3><pre>{escaped(trial.recipe)}</pre>" for trial in found.frontier),
    ]
    return document(title, parts)


def _legend(found: Tuning) -> str:
    asked = OBJECTIVES[found.objective]
    others = [each for each in ("drop", "bytes on disk", "time") if each != asked]
    return (
        f"Green, larger: the best, with the least {asked} within the constraints. Blue: no other is better in {asked}, "
        f"{' and '.join(others) if len(others) == 2 else ', '.join(others)} at once. Grey: the rest. Dashed: the drop "
        "that is allowed; what lost more than four times that is drawn at the top."
    )


def _plot(found: Tuning, unit: str, value: Callable[[Trial], float], text: Callable[[float], str]) -> str:
    """A value across, on a logarithmic axis; the drop upwards. The best is drawn last, over what lies below it."""
    measured = [trial for trial in found.trials if not trial.failure]
    if not measured:
        return "<p>Nothing was measured.</p>"
    frontier = {trial.name for trial in found.frontier}
    best = found.best.name if found.best is not None else None
    trials = sorted(measured, key=lambda trial: (trial.name == best, trial.name in frontier))
    allowed = found.constraints.max_drop
    least = min(trial.judged for trial in trials)
    most = max(4 * max(allowed, 0.1), least) if allowed is not None else math.inf
    drops = [min(trial.judged, most) for trial in trials]
    limit = [allowed] if allowed is not None and min(drops) <= allowed <= max(drops) else []
    across = scaled([math.log10(max(value(trial), 1e-9)) for trial in trials], _MARGIN, _WIDTH - _MARGIN)
    up = scaled([*drops, *limit], _HEIGHT - _MARGIN, 60)
    drawn = [f'<path d="M{_MARGIN - 12} 40V{_HEIGHT - 60}H{_WIDTH - 30}" fill="none" stroke="#888"/>']
    drawn += [
        f'<path d="M{_MARGIN - 12} {y:.1f}H{_WIDTH - 30}" stroke="#888" stroke-dasharray="4"/>'
        for y in up[len(drops) :]
    ]
    for trial, x, y in zip(trials, across, up, strict=False):
        color, radius = (
            ("#2a7d2e", 8) if trial.name == best else ("#3b6ea5", 6) if trial.name in frontier else ("#bbb", 6)
        )
        said = (
            f"{trial.name}: {trial.judged:+.2f} points lost, {size(trial.bytes)}, {trial.latency:.2f} of float's time"
        )
        drawn.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}" stroke="#fff"><title>{escaped(said)}'
            "</title></circle>"
        )
    low, high = (text(edge(map(value, trials))) for edge in (min, max))
    more = " or more" if max(trial.judged for trial in trials) > most else ""
    drawn += [
        f'<text x="{_MARGIN}" y="{_HEIGHT - 30}">{escaped(low)}</text>',
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 30}" text-anchor="end">{escaped(f"{high} {unit}")}</text>',
        f'<text x="4" y="{_HEIGHT - _MARGIN}">{min(drops):+.2f}</text>',
        f'<text x="4" y="30">{max(drops):+.2f} points lost{more}</text>',
    ]
    return f'<svg class="wide" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{"".join(drawn)}</svg>'


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

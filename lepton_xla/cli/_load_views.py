"""Output of `leptonx load`: a live line while it runs, then a table and a plot."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np

from lepton_xla.cli import _common
from lepton_xla.serve.load.generator import Generator as Running
from lepton_xla.serve.load.result import PERCENTILES, TIMED_OUT, Result

type Watch = Callable[[Running], None]

_FIGURES = (*(f"p{percent:g}" for percent in PERCENTILES), "max")
_BINS = 60
_NINES = ("p90", "p99", "p99.9", "p99.99", "p99.999")
_COLOURS = ("#3b6ea5", "#c2571a", "#4a8f4a", "#8a5ca8", "#a83b4c", "#7a6a3a")


@contextlib.contextmanager
def live(runs: int) -> Generator[Watch, None, None]:
    """Show a line about the last half second on stderr, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda generator: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # No automatic refresh: a drawing thread would hold the interpreter lock while answers arrive.
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as drawn:
        seen: dict[int, int] = {}

        def watch(generator: Running) -> None:
            before = seen.setdefault(id(generator), 0)
            seen[id(generator)] = len(generator.statuses)
            line = status_line(generator, before)
            line = f"{len(seen)} of {runs}  {line}" if runs > 1 else line
            drawn.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

        yield watch


def status_line(generator: Running, before: int) -> str:
    """Describe a running load; `before` is the number of answers at the last line."""
    load, now = generator.load, monotonic()
    what = f"{load.connections} connections" if load.rate is None else f"{load.rate:g}/s"
    if now < generator.began:
        return f"{what}  warming up  {generator.unanswered} in flight"
    latency_s, status = np.array(generator.latencies[before:]), np.array(generator.statuses[before:])
    good = latency_s[status == 200]
    shown = [_common.seconds(float(value)) for value in np.percentile(good, (50, 99))] if len(good) else ["-", "-"]
    left = max(0.0, generator.ends - now)
    return (
        f"{what}  {left:.0f} s left  {len(generator.due) / max(1e-3, now - generator.began):.0f}/s  "
        f"{generator.unanswered} in flight  p50 {shown[0]}  p99 {shown[1]}  {int((status != 200).sum())} errors"
    )


def show(document: Mapping[str, Any]) -> None:
    """Print the table of all runs and how to read it."""
    runs: Sequence[Mapping[str, Any]] = document["runs"]
    open_loop = runs[0]["rate"] is not None
    rows = [
        (
            f"{run['rate']:g}" if open_loop else run["connections"],
            f"{run['answered_per_s']:.0f}",
            f"{run['goodput_per_s']:.0f}",
            *(_milliseconds(run["latency_s"][name]) for name in _FIGURES),
            run["errors"],
        )
        for run in runs
    ]
    columns = ("rate" if open_loop else "connections", "answered", "good", *_FIGURES, "errors")
    _common.show(
        _common.table(
            f"{document['model']} at {document['url']}: requests a second, latency in ms",
            [f">{name}" for name in columns],
            rows,
        ),
        *(line for run in runs for line in _remarks(run, open_loop)),
        f"Each {runs[0]['seconds']:g} s after {document['warmup_s']:g} s of warm-up; {_payload(document)}.",
        "Latency covers good answers and requests given up,  "
        + ("from when each was due." if open_loop else "from when each was sent."),
    )


def _remarks(run: Mapping[str, Any], open_loop: bool) -> list[str]:
    name = f"{run['rate']:g}/s" if open_loop else f"{run['connections']} connections"
    lag = run["send_lag_s"]
    own = f"{run['generator_cores']:.2f} cores for the generator"
    if open_loop:
        own += (
            f", {run['most_connections']} connections; send lag p50 {_time(lag['p50'])}, p99 {_time(lag['p99'])}, "
            f"max {_time(lag['max'])}"
        )
    errors = ", ".join(f"{count} x {what}" for what, count in run["counts"].items() if what != "200")
    return [f"{name}: {own}", *([f"{name}: errors: {errors}"] if errors else [])]


def _time(value_s: float) -> str:
    return _common.seconds(value_s) if np.isfinite(value_s) else ""


def _milliseconds(value_s: float) -> str:
    """Format milliseconds with three digits, or more before the point."""
    if not np.isfinite(value_s):
        return ""
    value = value_s * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _payload(document: Mapping[str, Any]) -> str:
    inputs = ", ".join(f"{name} {entry['dtype']}{entry['shape']}" for name, entry in document["inputs"].items())
    return f"{_common.size(document['request_bytes'])} a request: {inputs}"


def draw(figure: Any, document: Mapping[str, Any], results: Sequence[Result], path: str) -> None:
    """Draw latency by percentile, over time, and (for several rates) by rate."""
    sweep = len(results) > 1
    figure.set_size_inches(15 if sweep else 10.5, 4.2)
    panels = figure.subplots(1, 3 if sweep else 2, squeeze=False)[0]
    for index, result in enumerate(results):
        load = result.load
        label = f"{load.connections} connections" if load.rate is None else f"{load.rate:g}/s"
        style = {"color": _COLOURS[index % len(_COLOURS)], "label": label, "linewidth": 1.2}
        _by_percentile(panels[0], result, style)
        _over_time(panels[1], result, style)
    _label(panels[0], "", "latency by percentile")
    panels[0].set_xticks([1.0, *(10.0**-nines for nines in range(1, 6))], ["min", *_NINES])
    panels[0].tick_params(axis="x", which="minor", bottom=False)
    panels[0].set_xlim(1, 1 / max(10, *(len(result.status) for result in results)))
    _label(panels[1], "seconds", "over time: p99 of those due then")
    if sweep:
        _by_load(panels[2], document["runs"])
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{document['model']}, {_payload(document)}", fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _by_percentile(axes: Any, result: Result, style: Mapping[str, Any]) -> None:
    """Plot latency over the share of slower requests, on a logarithmic scale: 0.01 is p99."""
    latency_s = np.sort(result.latency_s[result.counted])
    if not len(latency_s):
        return
    # Evenly spaced on the logarithmic axis; more points would not be visible.
    slower = np.unique(np.geomspace(1, len(latency_s), 400).astype(int))
    axes.plot(slower / len(latency_s), latency_s[len(latency_s) - slower] * 1e3, **style)
    axes.set_xscale("log")


def _over_time(axes: Any, result: Result, style: Mapping[str, Any]) -> None:
    due_s, latency_s = result.due_s[result.counted], result.latency_s[result.counted]
    width_s = result.seconds / _BINS
    order = np.argsort(due_s)
    edges = np.searchsorted(due_s[order], np.arange(_BINS + 1) * width_s)
    parts = [latency_s[order[start:stop]] for start, stop in itertools.pairwise(edges)]
    worst = [np.percentile(part, 99) * 1e3 if len(part) else np.nan for part in parts]
    axes.plot((np.arange(_BINS) + 0.5) * width_s, worst, **style)
    given_up = due_s[result.status[result.counted] == TIMED_OUT]
    axes.plot(given_up, np.full(len(given_up), result.load.timeout_s * 1e3), "x", color="black", markersize=3)


def _by_load(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    open_loop = runs[0]["rate"] is not None
    load = [run["rate"] if open_loop else run["connections"] for run in runs]
    for index, name in enumerate(_FIGURES[:-1]):
        latency_ms = [run["latency_s"][name] * 1e3 for run in runs]
        axes.plot(load, latency_ms, "o-", color=_COLOURS[index], label=name, linewidth=1.2, markersize=3)
    axes.legend(fontsize=8, frameon=False)
    _label(axes, "requests a second" if open_loop else "connections", "against the load")


def _label(axes: Any, below: str, title: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.set_xlabel(below)
    axes.set_ylabel("ms")
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)

"""`leptonx top`: what the models of a server do, live."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.cli.tables import Table, printable, show
from lepton_xla.errors import ServeError, first_line

if TYPE_CHECKING:
    from lepton_xla.serve.client import Client

type Figures = Mapping[tuple[str, str], Mapping[str, float]]
"""By model and version: a scrape; of a histogram by name and upper bound, of a device by name and number."""

_file = click.Path(dir_okay=False)
_PREFIX = "lepton_"
_LATENCY, _DEVICE = "request_seconds_bucket ", "model_devices "
# Series that differ by a label that is a number: the label, which stands behind a space in the names of figures.
_NUMBERED: dict[str, tuple[str, type[float] | type[int]]] = {
    _LATENCY.strip(): ("le", float), _DEVICE.strip(): ("device", int)
}  # fmt: skip


@click.command()
@click.argument("url")
@click.option("--interval", default=2.0, type=click.FloatRange(0.1), show_default=True, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Print one table, of one interval, and end.")
@click.option("--token-file", type=_file, help="File with the access token. By default the variable LEPTON_TOKEN.")
@click.option("--tls-ca", type=_file, help="CA certificates (PEM) to trust instead of the system's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object an interval.")
def top(url: str, *, interval: float, once: bool, as_json: bool, **access: Any) -> None:
    """Show live what the models of the server at URL do.

    For each version: its state, the number of its device, the memory it takes there, and over the last interval its
    requests per second, their median and p99, the rows that wait, and its share of the device's time. Percentiles are
    the upper bounds of the server's histogram. Ends with Ctrl-C.

    \b
      leptonx top http://localhost:8000
      leptonx top http://localhost:8000 --once --json
    """
    from lepton_xla.serve.client import Client

    with contextlib.suppress(KeyboardInterrupt), Client(url, **access) as client:
        looks = _looks(client, interval)
        if as_json or once or not sys.stdout.isatty():
            for rows in itertools.islice(looks, 1 if once else None):
                if as_json:
                    _common.print_json({"url": url, "models": rows}, line=True)
                else:
                    show(_table(rows))
        else:
            _show_live(looks)


def _looks(client: Client, interval_s: float) -> Iterator[list[dict[str, Any]]]:
    """The rows of one interval after the other."""
    before, began = figures_of(client.metrics()), time.monotonic()
    while True:
        time.sleep(interval_s)
        after, now = figures_of(client.metrics()), time.monotonic()
        yield rows_of(before, after, now - began, _states(client))
        before, began = after, now


def _show_live(looks: Iterator[list[dict[str, Any]]]) -> None:
    """Each table in the place of the one before."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(Text("..."), console=Console(), auto_refresh=False) as live:
        for rows in looks:
            live.update(Text("\n".join(_table(rows).lines(live.console.width))), refresh=True)


def figures_of(text: str) -> Figures:
    """The figures of models in a scrape.

    >>> figures_of('lepton_rows_total{model="a",version="1"} 3.0')
    {('a', '1'): {'rows_total': 3.0}}
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[tuple[str, str], dict[str, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = sample.labels
                if not sample.name.startswith(_PREFIX) or not math.isfinite(sample.value):
                    continue
                if "model" in labels and "version" in labels:
                    name = sample.name.removeprefix(_PREFIX)
                    if name in _NUMBERED:
                        label, read = _NUMBERED[name]
                        name += f" {read(labels.get(label, ''))}"
                    found.setdefault((labels["model"], labels["version"]), {})[name] = sample.value
    except ValueError as error:
        raise ServeError(f"what /metrics says is not in Prometheus' format: {first_line(error)}") from error
    return found


def rows_of(
    before: Figures, after: Figures, seconds: float, states: Mapping[tuple[str, str], str]
) -> list[dict[str, Any]]:
    """A row for each version, those first that had the most of the device.

    Args:
        before, after: two scrapes.
        seconds: between them.
        states: of versions, as the repository has them; of others the scrape tells.
    """
    rows: list[dict[str, Any]] = []
    for key in sorted({*after, *states}):
        now, then = after.get(key, {}), before.get(key, {})

        def grown(name: str, now: Mapping[str, float] = now, then: Mapping[str, float] = then) -> float:
            return max(now.get(name, 0.0) - then.get(name, 0.0), 0.0)

        ready = now.get("model_ready", 0.0) > 0
        state = states.get(key) or ("READY" if ready else "UNAVAILABLE")
        buckets = {float(name.removeprefix(_LATENCY)): grown(name) for name in now if name.startswith(_LATENCY)}
        devices = [int(name.removeprefix(_DEVICE)) for name in now if name.startswith(_DEVICE) and now[name]]
        rows.append({
            "model": key[0], "version": key[1], "state": state, "devices": sorted(devices),
            "bytes": int(now.get("model_bytes", 0)),
            "requests_per_s": grown("inference_requests_total") / seconds,
            "p50_s": _percentile(buckets, 0.5), "p99_s": _percentile(buckets, 0.99),
            "queue_rows": int(now.get("queue_rows", 0)),
            "device_share": grown("compute_seconds_sum") / seconds,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (-row["device_share"], row["model"], row["version"]))


def _percentile(buckets: Mapping[float, float], share: float) -> float | None:
    """The least upper bound that holds such a share; None if there is nothing, or it is beyond the last bound."""
    total = max(buckets.values(), default=0.0)
    if not total:
        return None
    bound = min(bound for bound, count in buckets.items() if count >= share * total)
    return None if math.isinf(bound) else bound


def _states(client: Client) -> dict[tuple[str, str], str]:
    from lepton_xla.serve.client import RequestError

    try:
        index = client.index()
    except RequestError:  # not allowed to ask
        return {}
    return {(each["name"], each.get("version", "")): each.get("state", "") for each in index}


def _table(rows: list[dict[str, Any]]) -> Table:
    def time_of(value: float | None) -> str:
        return "" if value is None else _common.seconds(value)

    cells = [
        (
            printable(row["model"]), printable(row["version"]), printable(row["state"].lower()),
            ",".join(map(str, row["devices"])), f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else "",
            f"{row['requests_per_s']:.1f}", time_of(row["p50_s"]), time_of(row["p99_s"]), row["queue_rows"],
            f"{row['device_share']:.0%}",
        )
        for row in rows
    ]  # fmt: skip
    heads = (
        "model", "version", "state", "device", ">MB", ">requests/s", ">p50", ">p99", ">rows waiting", ">device time",
    )  # fmt: skip
    return Table("", heads, cells)

"""Our server beside mosec, Triton, LitServe and the bare executable: throughput, latency, processor time, memory.

    python benchmarks/serving.py [--models first10,digits,minilm] [--mosec PYTHON] [--litserve PYTHON] [--triton PYTHON]

Every server gets the same rows, one a request. Closed loop: so many connections, each with one unanswered request (wrk
where it is installed, else our generator), on all cores, which the load generator shares; the servers take turns.
Open loop: requests due at random moments (Poisson) at a share of what the server answers, latency counted from when a
request was due; here the generator has one core and the server the others, so that asking for more takes nothing from
the server. A model's figures are kept when it is measured, so that a run that was stopped goes on with the next one;
`--fresh` starts anew. Writes docs/benchmarks/serving.md. Each other server in an environment of its own, such as

    python3.12 -m venv build/peers/triton && build/peers/triton/bin/pip install nvidia-pytriton==0.7.0
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import harness
import journal
import models
from contenders import MOSEC, OURS, candidates, console, ours, start
from loops import closed, medians
from open_loops import alone
from payloads import MODELS, Bare
from serving_page import page, tables

from lepton_xla.serve.runtime import run_on_calling_thread

CONNECTIONS = (1, 8, 64, 256)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        path, payload = MODELS[name](pathlib.Path(folder), options.quick)
        bare = Bare(path, payload)
        bare_rows = bare.by_size(0.2 if options.quick else 2.0)
        best = max(bare_rows, key=lambda size: bare_rows[size])
        makers = candidates(name, path, payload, options)
        servers, notes = start(makers, payload)
        try:
            rows: dict[str, dict[str, Any]] = {server.name: {"closed": {}} for server in servers}
            for connections in options.connections:
                turns: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
                bare_rates = []
                for index in range(options.rounds):
                    bare_rates.append(bare.rate(best, options.seconds) / payload.count)
                    for server in servers[index % len(servers) :] + servers[: index % len(servers)]:
                        turns[server.name].append(closed(server, connections, options.seconds))
                for label, found in turns.items():
                    ratios = {"of_bare": _ratio(found, bare_rates)}
                    if mosec := [[each["rate"] for each in turns[name]] for name in turns if name.startswith(MOSEC)]:
                        ratios["x"] = _ratio(found, max(mosec, key=statistics.median))
                    rows[label]["closed"][str(connections)] = medians(found) | ratios
                console.print(f"  {connections} connections: " + _line(rows, str(connections)))
            for server in servers:
                rows[server.name]["memory"] = server.memory()
        finally:
            for server in servers:
                server.stop()
        # Not of those in several processes, which would have but one core.
        for label in (label for label in rows if label in (OURS, MOSEC, "LitServe", "Triton")):
            console.print(f"  {label}: open loops ...")
            again = None
            if label == OURS:
                again = lambda bound: ours(OURS, path, payload, "--max-queue-rows", str(bound * payload.count))  # noqa: E731
            rows[label]["open"] = alone(makers[label], again, payload.count, options)
        steps = hot_path(pathlib.Path(folder), options.quick) if name == "first10" else {}
    return {"bare": bare_rows, "rows": payload.count, "servers": rows, "notes": notes, "steps": steps}


def hot_path(folder: pathlib.Path, quick: bool) -> dict[str, float]:
    """Microseconds of a request by what our server does with it; see `hot_path.py`."""
    script, file = pathlib.Path(__file__).parent / "hot_path.py", folder / "steps.json"
    rounds = "20" if quick else "1000"
    subprocess.run([sys.executable, str(script), "--rounds", rounds, "--json", str(file)], check=True)
    return json.loads(file.read_text())


def _ratio(found: Sequence[Mapping[str, float]], others: Sequence[float]) -> float:
    """The median of rates over others of the same rounds."""
    return statistics.median(each["rate"] / other for each, other in zip(found, others, strict=True))


def _line(rows: Mapping[str, Any], key: str) -> str:
    return ", ".join(
        f"{label} {row['closed'][key]['rate']:,.0f}/s p99 {row['closed'][key]['p99']:.2f} ms"
        for label, row in rows.items()
    )


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_names(parser, "--models", MODELS)
    parser.add_argument("--mosec", help="a Python that has mosec (and lepton_xla, for other models than first10)")
    parser.add_argument("--litserve", help="a Python that has litserve")
    parser.add_argument("--triton", help="a Python 3.12 that has nvidia-pytriton 0.7.0")
    several = (len(os.sched_getaffinity(0)),) if len(os.sched_getaffinity(0)) > 1 else ()
    parser.add_argument(
        "--workers", type=harness.numbers(int), default=several,
        help="also ours and mosec with so many processes; default: as many as there are cores",
    )  # fmt: skip
    parser.add_argument(
        "--connections", type=harness.numbers(int), default=CONNECTIONS, help="closed loops; default 1,8,64,256"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of one closed loop")
    parser.add_argument("--open-seconds", type=float, default=10.0, help="of one open loop")
    parser.add_argument("--minute-seconds", type=float, default=60.0, help="of ours at 80 %% of its capacity")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server at each number of connections")
    parser.add_argument("--quick", action="store_true", help="little of everything, no page: a smoke test")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.open_seconds, options.minute_seconds = 1.0, 0.5, 0.5
        options.rounds, options.connections = 1, (1, 8)
    figures = ("mosec", "litserve", "triton", "workers", "connections", "rounds")
    figures += ("seconds", "open_seconds", "minute_seconds")
    rows = journal.opened("serving", options, *figures)
    run_on_calling_thread()  # as our server does: the bare executable is to be at its best
    measured: dict[str, Any] = {}
    for name in options.models:
        load = f"{os.getloadavg()[0]:.1f}"
        console.print(f"{name}: making the artifact ...")
        try:
            measured[name] = rows.row(name, functools.partial(measure, name, options))
        except models.MissingError as error:
            console.print(f"{name}: skipped: {error}")
            continue
        measured[name]["run"] = harness.machine() | {"command": harness.command(), "load": load}
        for part in tables(measured[name]):
            console.print(part, markup=False, soft_wrap=True)
        if not options.quick:
            harness.publish("serving", {name: measured[name]}, page)
    harness.write_json(options.json, measured)
    console.print(f"repeat with: {harness.command()}")
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())

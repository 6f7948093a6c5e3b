"""docs/benchmarks/serving.md, from the figures of `serving.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import harness
from contenders import FLOOR, OURS
from open_loops import CAPACITY_AT, OVER_ROUNDS, SHARES

# Share of the capacity that good answers should keep, whatever is asked.
GOODPUT = 0.9


TITLES = {
    "first10": "784 numbers in, 10 out",
    "digits": "The digits CNN, recipe int8: 64 numbers in, 10 out",
    "digits8": "The digits CNN, recipe int8, 8 rows a request",
    "minilm": "MiniLM, recipe int8: 128 tokens in, 384 numbers out",
}


def page(results: Mapping[str, Any]) -> str:
    """The page of all results so far."""
    parts = [
        "# Serving",
        (
            "Each request has one row unless stated otherwise. Times are in milliseconds; the load generator runs on "
            "the same machine.\n\n**Closed loop**: every connection always has one request in flight. All cores are "
            "used. Figures are medians over rounds in which the servers take turns. `x` is the request rate with "
            f"{CAPACITY_AT} connections, relative to the better of mosec's two rows in the same round. `CPU` is "
            "processor seconds per 1000 requests of the server at that number of connections, `memory` what its "
            "processes hold after the closed loops. `of bare` is the highest rows/s at any number of connections, "
            "relative to the executable called in a loop at its best batch size in the same rounds. Servers that can "
            "run the model in several processes have a row with one process and a row with one per core.\n\nIn the "
            "first table mosec, LitServe and Triton run the model in NumPy. In the others mosec runs our artifact "
            "from Python, as its users would, one row a request. `HTTP alone` parses requests with httptools on "
            "uvloop, as our server does, and always answers the same bytes: the upper limit for a server in Python."
        ),
        (
            "**Open loop**: requests are due at random moments (a Poisson process) at a share of the capacity, and "
            "latency counts from when a request was due; medians over rounds. The generator has the last core and the "
            "server all others, so that a higher rate takes nothing from the server. The capacity is what a closed "
            f"loop of {CAPACITY_AT} connections reached immediately before, because a shared machine is not always "
            "equally fast. If the generator uses more than 90 % of its core, its own delay dominates the latencies, "
            "and the capacity may be the generator's. A row is missing if the generator cannot reach twice the "
            f"capacity.\n\n**Twice the capacity**: medians of {OVER_ROUNDS} rounds, each between two closed loops "
            "whose mean rate is the capacity. Our server runs with its default queue, except here, where the queue "
            "holds a quarter of a second of requests, or as many as the closed loop has. The server reads and answers "
            "rejected requests too; goodput loses that time."
        ),
    ]
    for name, result in ((name, results[name]) for name in TITLES if name in results):
        parts += [f"## {TITLES[name]}", *tables(result), *result["notes"], harness.provenance(result["run"])]
    return "\n\n".join(parts) + "\n"


def tables(result: Mapping[str, Any]) -> list[str]:
    servers = result["servers"]
    keys = list(next(iter(servers.values()))["closed"]) if servers else []
    header = ["closed loop", *(f"{key} connections: req/s (p50, p99, p99.9)" for key in keys)]
    header += ["x", "of bare", "CPU", "memory MB", "errors"]
    at = str(CAPACITY_AT) if str(CAPACITY_AT) in keys else keys[-1]
    cells = []
    for label, row in servers.items():
        found = row["closed"]
        cells.append([
            label,
            *(_cell(found[k]) for k in keys),
            f"{found[at]['x']:.2f}" if "x" in found[at] else "",
            f"{100 * max(found[k]['of_bare'] for k in keys):.0f} %",
            f"{found[at]['cpu_s_per_1000']:.3f}",
            f"{row['memory'] / 1e6:,.0f}",
            f"{sum(found[k]['errors'] for k in keys):.0f}",
        ])  # fmt: skip
    bare_line = ", ".join(f"{rows:,.0f} at {size}" for size, rows in result["bare"].items())
    open_header = ["open loop", "capacity: req/s (generator's core)"]
    open_header += [f"{100 * share:g} %: req/s (p50, p99, p99.9; core)" for share in SHARES] + ["errors"]
    opened = {label: row for label, row in servers.items() if "open" in row}
    open_cells = [
        [
            label,
            f"{row['open']['capacity']:,.0f} ({100 * row['open']['generator']:.0f} %)",
            *(_open_cell(row["open"][f"{share:g}"]) for share in SHARES),
            f"{sum(row['open'][f'{share:g}']['errors'] for share in SHARES):.0f}",
        ]
        for label, row in opened.items()
    ]
    over_header = ["twice the capacity", "asked", "good answers", "p99 of them", "refused", "told so within (p99)"]
    over_header += ["goodput lost by refusal, µs"]
    over_header += ["p99 in the second after, at half the capacity", "in the two after that", "refused then"]
    over_header += ["wrong answers"]
    over_cells = [
        [
            label,
            f"{found['asked']:.2f}",
            f"{found['goodput']:.2f}",
            f"{found['p99']:.1f}",
            f"{found['refused']:,.0f}",
            f"{found['refused_p99']:.1f}",
            f"{found['refusal_us']:.0f}",
            f"{found['after_p99']:.1f}",
            f"{found['later_p99']:.1f}",
            f"{found['later_refused']:,.0f}",
            f"{found['wrong']:,.0f}",
        ]
        for label, row in opened.items()
        if (found := row["open"]["over"]) is not None
    ]
    parts = [
        harness.markdown(header, cells),
        f"Bare executable, rows/s by batch size: {bare_line}.",
        harness.markdown(open_header, open_cells),
    ]
    if over_cells:
        parts.append(harness.markdown(over_header, over_cells))
    else:
        parts.append("The generator could not reach twice the capacity.")
    if steps := result.get("steps"):
        taken = f"{1e3 * servers[OURS]['closed'][at]['cpu_s_per_1000']:.1f}"
        floor = f"{1e3 * servers[FLOOR]['closed'][at]['cpu_s_per_1000']:.1f}" if FLOOR in servers else "?"
        text = (
            f"Our server takes {taken} µs of processor time per request with {at} connections, {FLOOR} {floor} µs. The "
            "table lists its own steps, each measured alone without sockets (`python benchmarks/hot_path.py`). The "
            "rest is spent in the operating system, in uvloop, and waiting for memory."
        )
        lines = [[step, f"{micros:.1f}"] for step, micros in steps.items()]
        parts += [text, harness.markdown(["step, 64 requests at once", "µs a request"], lines)]
    if OURS in servers:
        own = servers[OURS]["open"]
        minute, unloaded, batch = own["minute"], own["unloaded_p50"], own["batch_ms"]
        parts.append(
            f"Our server for {minute['seconds']:.0f} s at 80 % of its capacity: {minute['requests']:,.0f} requests, "
            f"{minute['errors']:.0f} errors, p50 {minute['p50']:.2f} ms, p99 {minute['p99']:.2f} ms; the median over "
            f"the seconds of each second's p99 is {minute['second_p99']:.2f} ms. The capacity was "
            f"{minute['capacity_before']:,.0f}/s before and {minute['capacity_after']:,.0f}/s after the run. The "
            f"generator used {100 * minute['cores']:.0f} % of its core and sent 99 % of the requests at most "
            f"{minute['lag_p99']:.2f} ms late. Two references for the p99: three times the unloaded latency of "
            f"{unloaded:.2f} ms plus one execution of the largest size, {batch:.2f} ms, is {3 * unloaded + batch:.2f} "
            "ms; a simulated queue at that rate, with these executions and no other work, has a p99 of "
            f"{own['queue_p99']:.2f} ms. The machine adds its own delays: equal pieces of a Python loop, timed one "
            "after the other on the server's core, do not all take the same time, and work that needs 80 % of that "
            f"core would wait up to {own['core_p99']:.1f} ms (p99)."
        )
        if FLOOR in servers and own["over"] is not None:
            answer_us = 1e6 / own["capacity"]
            floor_us = 1e3 * servers[FLOOR]["closed"][at]["cpu_s_per_1000"]
            parts.append(
                f"To keep goodput at {GOODPUT:g} of the capacity at twice the requests, the server may spend "
                f"{answer_us * (1 - GOODPUT) / (2 - GOODPUT):.1f} µs on reading and rejecting a request. An answer "
                f"takes {answer_us:.1f} µs on one core; {FLOOR} takes {floor_us:.1f} µs."
            )
    return parts


def _cell(found: Mapping[str, float]) -> str:
    return f"{found['rate']:,.0f} ({found['p50']:.2f}, {found['p99']:.2f}, {found['p999']:.2f})"


def _open_cell(found: Mapping[str, float]) -> str:
    return f"{_cell(found)[:-1]}; {100 * found['cores']:.0f} %)"

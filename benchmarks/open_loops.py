"""Open loops: one server at shares of its capacity and at twice its capacity. The generator has its own core."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from loops import figures_of, load, medians, on_cores, result_of
from prometheus_client.parser import text_string_to_metric_families
from server_process import Server

from lepton_xla.serve.batching.costs import Costs
from lepton_xla.serve.load.result import Result

SHARES = (0.5, 0.8, 0.95)
CAPACITY_AT = 64
OPEN_CONNECTIONS = 512
OPEN_ROUNDS, OVER_ROUNDS = 3, 9
# Share of its core above which the generator's own delay dominates the latency.
GENERATOR_CORE = 0.9


def alone(
    make: Callable[[], Server], bounded: Callable[[int], Server] | None, rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of the open loops of one server. It has all cores except the last, which is the generator's.

    Args:
        make: starts the server.
        bounded: starts it with a queue of this many requests, if it is ours.
        rows: rows per request.
        options: options of the command line.

    Returns:
        `capacity`, requests/s of a closed loop; `unloaded_p50`, milliseconds of one connection; the open loops by
        share of the capacity, each right after a closed one; of ours also `minute`, a long one between two closed ones,
        `batch_ms`, an execution of the largest size, `queue_p99`, see `queue_p99_s`, and `core_p99`, see `core_p99_s`;
        `over`, what becomes of twice the capacity, or None where the generator cannot ask for so much.
    """
    with on_cores(slice(None, -1)):
        server = make()
    try:
        server.wait()
        open_rounds, over_rounds = (1, 1) if options.quick else (OPEN_ROUNDS, OVER_ROUNDS)
        open_s = options.open_seconds / open_rounds
        found: dict[str, Any] = {"unloaded_p50": load(server, None, 1, options.seconds)["p50"]}
        full: list[dict[str, float]] = []
        for share in SHARES:
            rounds = []
            for _ in range(open_rounds):
                full.append(load(server, None, CAPACITY_AT, open_s / 2))
                rounds.append(load(server, share * full[-1]["rate"], OPEN_CONNECTIONS, open_s))
            found[f"{share:g}"] = medians(rounds)
        usual = medians(full)
        capacity = found["capacity"] = usual["rate"]
        found["generator"] = usual["cores"]
        most = capacity * GENERATOR_CORE / usual["cores"]
        found["over"] = None
        if bounded is not None:
            before = load(server, None, CAPACITY_AT, open_s)["rate"]
            minute = result_of(server, 0.8 * before, OPEN_CONNECTIONS, options.minute_seconds, warmup_s=1.0)
            second = minute.due_s.astype(int)
            by_second = [minute.percentiles(minute.latency_s[second == each])["p99"] for each in np.unique(second)]
            found["minute"] = figures_of(minute) | {
                "second_p99": 1e3 * statistics.median(by_second),
                "capacity_before": before,
                "capacity_after": load(server, None, CAPACITY_AT, open_s)["rate"],
            }
            costs = _costs(server)
            found["batch_ms"] = 1e3 * max(costs.values())
            found["queue_p99"] = 1e3 * queue_p99_s(costs, 0.8 * capacity * rows, rows)
            found["core_p99"] = 1e3 * core_p99_s(options.minute_seconds / 3)
            server.stop()
            # A queue of a quarter of a second, which the generator's connections can fill and a closed loop cannot.
            queue = max(CAPACITY_AT, min(round(capacity / 4), OPEN_CONNECTIONS * 3 // 4))
            with on_cores(slice(None, -1)):
                server = bounded(queue)
            server.wait()
        if 2 * capacity <= most:
            found["over"] = overloaded(server, over_rounds, 3 * options.open_seconds / over_rounds)
    finally:
        server.stop()
    return found


def _costs(server: Server) -> dict[int, float]:
    """Seconds of an execution by batch size, from our server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    (found,) = (family for family in families if family.name == "lepton_cost_seconds")
    return {int(sample.labels["batch"]): sample.value for sample in found.samples}


def queue_p99_s(costs: Mapping[int, float], rate: float, rows: int, count: int = 100_000) -> float:
    """The 99th percentile of latency, in seconds, if requests waited for nothing but executions.

    A simulation of a server without HTTP cost: Poisson arrivals of `rate` rows/s; executions run one after the other,
    take the times of the table, and have the size with the least cost per waiting row.
    """
    table = Costs(sorted(costs), {(): costs})
    due = np.cumsum(np.random.default_rng(0).exponential(rows / rate, count))
    taken = np.empty(count)
    now, at = 0.0, 0
    while at < count:
        now = max(now, due[at])
        waiting = int(np.searchsorted(due, now, side="right")) - at
        size = table.size((), waiting * rows)
        now += table.of((), size)
        done = min(waiting, max(size // rows, 1))
        taken[at : at + done] = now - due[at : at + done]
        at += done
    return float(np.percentile(taken, 99))


def core_p99_s(seconds: float, load: float = 0.8) -> float:
    """The 99th percentile of waiting, in seconds, for a core whose speed varies.

    The server's first core runs pieces of a Python loop, half a millisecond each, one after the other, while the
    generator's core does the same. Work that arrives evenly, at `load` times the core's median speed, must wait
    whenever pieces take longer. No server on this core can wait less.
    """
    piece = (
        "import sys, time\n"
        "end, times = time.perf_counter() + float(sys.argv[1]), [time.perf_counter()]\n"
        "while times[-1] < end:\n"
        "    seen = {}\n"
        "    for number in range(3000):\n"
        "        seen[number & 255] = str(number)\n"
        "    times.append(time.perf_counter())\n"
        "print(*times)\n"
    )
    command = [sys.executable, "-c", piece, str(seconds)]
    with on_cores(slice(-1, None)):
        other = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with on_cores(slice(None, 1)):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    other.wait()
    taken = np.diff(np.array(done.stdout.split(), float))
    usual, waiting, waits = float(np.median(taken)), 0.0, []
    for each in taken:
        waiting = max(0.0, waiting + load * float(each) - usual)
        waits.append(waiting)
    return float(np.percentile(waits, 99))


def overloaded(server: Server, count: int, seconds: float) -> dict[str, float]:
    """Figures at twice the capacity, and at half of it right after.

    Each of `count` rounds of `seconds` runs between two closed loops, whose mean rate is the capacity of that round,
    because a shared machine is not equally fast in every second.

    Returns:
        Medians of the rounds, or sums where they count: `goodput`, good answers/s over the capacity; `asked`, sent
        requests/s over the capacity; `p99` of good answers; `refused`, rejected requests; `refused_p99`, milliseconds
        until a rejection; `refusal_us`, goodput lost per rejection; `after_p99`, of requests due in the first second
        after the overload; `later_p99`, of those due in the next two seconds, of which `later_refused` were rejected;
        `wrong`, answers other than 200, 503, 429.
    """

    def refusals(result: Result) -> np.ndarray:
        return np.isin(result.status, (503, 429))

    def wrong(result: Result) -> float:
        return float((~refusals(result) & (result.status != 200)).sum())

    def p99(latencies: np.ndarray) -> float:
        return 1e3 * float(np.percentile(latencies, 99)) if len(latencies) else float("nan")

    def closed_loop() -> float:
        return load(server, None, CAPACITY_AT, seconds / 2)["rate"]

    rounds: list[dict[str, float]] = []
    capacity = closed_loop()
    for _ in range(count):
        before = capacity
        hard = result_of(server, 2 * before, OPEN_CONNECTIONS, seconds, warmup_s=1.0)
        after = closed_loop()
        capacity = (before + after) / 2
        refused = refusals(hard)
        goodput, asked = (count / hard.seconds / capacity for count in (hard.good, len(hard.status)))
        no_rate = refused.sum() / hard.seconds
        rounds.append({
            "goodput": goodput,
            "asked": asked,
            "p99": p99(hard.latency_s[hard.status == 200]),
            "refused": float(refused.sum()),
            "refused_p99": p99(hard.latency_s[refused]),
            "refusal_us": 1e6 * max(1 - goodput, 0.0) / no_rate if no_rate else float("nan"),
            "wrong": wrong(hard),
        })  # fmt: skip
        capacity = after
    soft = result_of(server, capacity / 2, OPEN_CONNECTIONS, 3.0, warmup_s=0.0)
    first, good = soft.due_s < 1, soft.status == 200
    found = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    return found | {
        "refused": sum(each["refused"] for each in rounds),
        "wrong": sum(each["wrong"] for each in rounds) + wrong(soft),
        "after_p99": p99(soft.latency_s[first & good]),
        "later_p99": p99(soft.latency_s[~first & good]),
        "later_refused": float((~first & refusals(soft)).sum()),
    }

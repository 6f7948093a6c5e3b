"""Closed and open loops of requests at a server, by wrk or by our generator."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from server_process import Server, turn

from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.load.generator import generate
from lepton_xla.serve.load.result import Load, Result

_LUA = """
wrk.method = "POST"
local file = io.open("{body}", "rb"); wrk.body = file:read("*all"); file:close()
{fields}
done = function(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.timeout + e.status
  io.write(string.format("FIGURES %d %d %d %f %f %f\\n", summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"""


@contextlib.contextmanager
def on_cores(wanted: slice) -> Iterator[None]:
    """Pins this thread, and what it starts, to some of the cores. No-op on a machine with one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[wanted] or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def closed(server: Server, connections: int, seconds: float) -> dict[str, float]:
    """Figures of a closed loop: requests/s, percentiles in milliseconds, errors, processor time."""
    with turn(server):
        if shutil.which("wrk"):
            _wrk(server, connections, 0.5)
        used = server.cpu_s()
        figures = (
            _wrk(server, connections, seconds) if shutil.which("wrk") else load(server, None, connections, seconds)
        )
        used = server.cpu_s() - used
    if not figures["requests"]:
        raise RuntimeError(f"{server.name or server.url} answered nothing")
    return figures | {"cpu_s_per_1000": 1000 * used / max(figures["requests"], 1)}


def _wrk(server: Server, connections: int, seconds: float) -> dict[str, float]:
    body, fields = server.request
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "body").write_bytes(body)
        lines = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in fields.items())
        script = pathlib.Path(folder) / "post.lua"
        script.write_text(_LUA.format(body=f"{folder}/body", fields=lines))
        done = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", script,
             server.url],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIGURES"))
    requests, micros, errors, *percentiles = map(float, line.split()[1:])
    p50, p99, p999 = (value / 1e3 for value in percentiles)
    return {
        "rate": requests / micros * 1e6, "requests": requests, "errors": errors, "p50": p50, "p99": p99, "p999": p999
    }  # fmt: skip


def result_of(server: Server, rate: float | None, connections: int, seconds: float, *, warmup_s: float) -> Result:
    body, fields = server.request
    lines = [f"POST {server.path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    load = Load(rate=rate, connections=connections, seconds=seconds, warmup_s=warmup_s, timeout_s=10.0)
    with on_cores(slice(-1, None)):
        return generate(endpoint(f"http://127.0.0.1:{server.port}"), request, load)


def load(server: Server, rate: float | None, connections: int, seconds: float) -> dict[str, float]:
    return figures_of(result_of(server, rate, connections, seconds, warmup_s=1.0))


def figures_of(result: Result) -> dict[str, float]:
    found = result.percentiles()
    return {
        "rate": result.good / result.seconds,
        "seconds": result.seconds,
        "requests": float(len(result.status)),
        "errors": float(result.errors),
        "p50": 1e3 * found["p50"],
        "p99": 1e3 * found["p99"],
        "p999": 1e3 * found["p99.9"],
        "cores": result.cores,
        "lag_p99": 1e3 * result.percentiles(result.lag_s)["p99"],
    }


def medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return medians | {"errors": sum(each["errors"] for each in found)}

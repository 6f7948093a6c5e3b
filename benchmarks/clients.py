"""Processor time of clients per request: our clients, others, and our load generator, at a server that does no work.

    python benchmarks/clients.py [--seconds 3 | --quick]

The server is a separate process that answers every request with the same 10 floats; requests carry 784. httpx, urllib3
and tritonclient are included if they are installed. Times are processor times of the client, which vary less on a busy
machine than requests per second.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import importlib.util
import pathlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import uvloop

from lepton_xla.cli.tables import Table, show
from lepton_xla.serve.client import AsyncClient, Client
from lepton_xla.serve.client.arrays import write_infer
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.load.generator import generate
from lepton_xla.serve.load.result import Load

X = np.random.default_rng(0).random((1, 784), np.float32)
PATH = "/v2/models/m/infer"
AT_ONCE = 64
RATES = (1_000.0, 15_000.0, 30_000.0, 50_000.0)


def measure(call: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Requests per second and processor seconds per request, one request after the other."""
    for _ in range(100):
        call()
    count, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - began), (time.process_time() - used) / count


async def measure_async(call: Callable[[], Awaitable[Any]], seconds: float) -> tuple[float, float]:
    """The same with `AT_ONCE` requests in flight."""
    count = [0]

    async def ask() -> None:
        while True:
            await call()
            count[0] += 1

    tasks = [asyncio.create_task(ask()) for _ in range(AT_ONCE)]
    await asyncio.sleep(0.5)
    count[0], began, used = 0, time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    found = count[0] / (time.perf_counter() - began), (time.process_time() - used) / max(1, count[0])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def blocking(port: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Measure each blocking client."""
    url = f"http://127.0.0.1:{port}"
    head, tail = write_infer({"x": X})
    body = head + b"".join(tail)
    fields = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    found: dict[str, tuple[float, float]] = {}
    with Client(url) as client:
        np.testing.assert_array_equal(client.infer("m", x=X)["y"], X[:, :10])
        found["ours"] = measure(lambda: client.infer("m", x=X), seconds)
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def plain() -> bytes:
        connection.request("POST", PATH, body, fields)
        return connection.getresponse().read()

    found["http.client (no tensors)"] = measure(plain, seconds)
    connection.close()
    if has("urllib3"):
        import urllib3

        pool = urllib3.PoolManager()
        found["urllib3 (no tensors)"] = measure(
            lambda: pool.request("POST", url + PATH, body=body, headers=fields).data, seconds
        )
    if has("httpx"):
        import httpx

        with httpx.Client() as plain_client:
            found["httpx (no tensors)"] = measure(
                lambda: plain_client.post(url + PATH, content=body, headers=fields).content, seconds
            )
    if has("tritonclient"):
        import tritonclient.http

        triton = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")

        def infer() -> Any:
            given = tritonclient.http.InferInput("x", [1, 784], "FP32")
            given.set_data_from_numpy(X)
            return triton.infer("m", [given]).as_numpy("y")

        found["tritonclient"] = measure(infer, seconds)
    return found


async def asynchronous(port: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Measure each asynchronous client."""
    url = f"http://127.0.0.1:{port}"
    found: dict[str, tuple[float, float]] = {}
    async with AsyncClient(url) as client:
        found["ours"] = await measure_async(lambda: client.infer("m", x=X), seconds)
    if has("httpx"):
        import httpx

        head, tail = write_infer({"x": X})
        body, fields = head + b"".join(tail), {"Inference-Header-Content-Length": str(len(head))}
        async with httpx.AsyncClient() as plain:
            found["httpx (no tensors)"] = await measure_async(
                lambda: plain.post(url + PATH, content=body, headers=fields), seconds
            )
    if has("tritonclient") and has("aiohttp"):
        import tritonclient.http.aio

        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{port}") as triton:

            async def infer() -> Any:
                given = tritonclient.http.InferInput("x", [1, 784], "FP32")
                given.set_data_from_numpy(X)
                return (await triton.infer("m", [given])).as_numpy("y")

            found["tritonclient.http.aio"] = await measure_async(infer, seconds)
    return found


def loads(port: int, seconds: float) -> Table:
    """Measure the load generator at growing rates."""
    target = endpoint(f"http://127.0.0.1:{port}")
    head, tail = write_infer({"x": X})
    request = target.request("POST", PATH, (head, *tail), len(head))
    columns = (">requests/s asked", ">answers/s", ">us of a core a request", ">send lag p50 us", ">p99 us")
    rows: list[tuple[str, ...]] = []
    for rate in RATES:
        result = generate(target, request, Load(rate, 1000, seconds, 1.0, 10.0))
        lag = result.percentiles(result.lag_s)
        each = result.cores * result.seconds / max(1, result.answered)
        figures = (rate, result.answered / result.seconds, lag["p50"] * 1e6, lag["p99"] * 1e6)
        asked, answered, *lags = (f"{figure:.0f}" for figure in figures)
        rows.append((asked, answered, f"{each * 1e6:.1f}", *lags))
    return Table("load generator, open loop", columns, rows)


def compared(title: str, found: dict[str, tuple[float, float]]) -> Table:
    """A table of clients."""
    rows = [(name, f"{rate:.0f}", f"{each * 1e6:.1f}") for name, (rate, each) in found.items()]
    return Table(title, ("client", ">requests/s", ">us of a core a request"), rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="a tenth of a second each: a smoke test")
    options = parser.parse_args()
    seconds = 0.1 if options.quick else options.seconds
    command = [sys.executable, str(pathlib.Path(__file__).parent / "servers" / "http_server.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            show(compared("one request after the other", blocking(port, seconds)))
            show(compared(f"{AT_ONCE} requests at once", uvloop.run(asynchronous(port, seconds))))
            show(loads(port, seconds))
        finally:
            server.kill()


if __name__ == "__main__":
    main()

"""How long small requests wait beside large ones in JSON, read beside the event loop or on it.

    python benchmarks/long_bodies.py

Three processes: a server, one client that sends large requests one after the other, and one that sends a small one
every millisecond on each of four connections. The model gives back its input, so that all there is to measure is the
protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lepton_xla.program import TensorSpec
from lepton_xla.serve import Options, Server, app
from lepton_xla.serve.protocol import jsondata

COLUMNS = 50_000
SMALL = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


class Echo:
    """Gives back its input."""

    name = "echo"
    version = "1"
    inputs = {"x": TensorSpec(("batch", COLUMNS), "float32")}  # noqa: RUF012
    outputs = {"y": TensorSpec(("batch", COLUMNS), "float32")}  # noqa: RUF012
    buckets = {"batch": (1, 8)}  # noqa: RUF012

    def run(self, sizes: dict[str, int], arrays: list[Any]) -> list[Any]:
        """Copies."""
        return [arrays[0].copy()]


def serve(on_loop: bool, pipe: Connection) -> None:
    """The process of the server, until anything comes through the pipe."""
    if on_loop:
        app.PIECE_BYTES = jsondata.PIECE_BYTES = jsondata._PIECE_ITEMS = 1 << 40
    with Server(Echo(), Options(port=0)) as server:
        pipe.send(server.address)
        pipe.recv()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    """One request and its answer."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    await reader.readexactly(int(head.lower().rpartition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0]))


def send_large(address: tuple[str, int], rows: int, count: int, pipe: Connection) -> None:
    """The process of the client of large requests; gives its body's size, and the seconds of each request."""
    x = np.random.default_rng(0).standard_normal((rows, COLUMNS)).astype(np.float32)
    given = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    body = json.dumps({"inputs": [given]}).encode()
    request = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    pipe.send(len(body))
    pipe.recv()

    async def main() -> list[float]:
        reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
        seconds: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            await ask(reader, writer, request)
            seconds.append(time.perf_counter() - start)
        writer.close()
        return seconds

    pipe.send(asyncio.run(main()))


async def small_latencies(address: tuple[str, int], pipe: Connection) -> tuple[list[float], list[float]]:
    """Seconds of small requests while the other process sends its large ones, and what that one says."""
    seconds: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(*address)
        while not pipe.poll():
            start = time.perf_counter()
            await ask(reader, writer, SMALL)
            seconds.append(time.perf_counter() - start)
            await asyncio.sleep(0.001)
        writer.close()

    pipe.send("go")
    await asyncio.gather(*(client() for _ in range(4)))
    return seconds, pipe.recv()


def measure(rows: int, count: int, *, on_loop: bool) -> None:
    """Prints one line."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(on_loop, there), daemon=True)
    server.start()
    address = here.recv()
    mine, theirs = context.Pipe()
    large = context.Process(target=send_large, args=(address, rows, count, theirs), daemon=True)
    large.start()
    size = mine.recv()
    small, long = asyncio.run(small_latencies(address, mine))
    here.send("stop")
    large.join()
    server.join()
    p50, p99, most = (1e3 * value for value in (*np.percentile(small, [50, 99]), max(small)))
    where = "on the event loop" if on_loop else "beside it"
    print(
        f"{size / 1e6:5.1f} MB read {where:17}: small p50 {p50:5.2f} ms, p99 {p99:6.1f} ms, max {most:6.1f} ms; "
        f"large {1e3 * float(np.median(long)):4.0f} ms"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10, help="large requests")
    arguments = parser.parse_args()
    for rows in (1, 16):
        for on_loop in (True, False):
            measure(rows, arguments.count, on_loop=on_loop)

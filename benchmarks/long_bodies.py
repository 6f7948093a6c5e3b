"""Latency of small requests next to large JSON requests, parsed off or on the event loop, and next to hostile ones.

    python benchmarks/long_bodies.py

Three processes: a server, a client that sends large requests one after the other, and a client that sends a small
request every millisecond on each of four connections. The model returns its input, so only the protocol is measured.
Hostile requests have the maximum body size, most are compressed, and all are rejected, except for tiny requests that
arrive by the thousand at once, which are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lepton_xla.program import TensorSpec
from lepton_xla.serve import Options, Server, app
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol import jsondata

COLUMNS = 50_000
SMALL = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


class Echo:
    """A model that returns its input."""

    name = "echo"
    version = "1"
    inputs = {"x": TensorSpec(("batch", COLUMNS), "float32")}  # noqa: RUF012
    outputs = {"y": TensorSpec(("batch", COLUMNS), "float32")}  # noqa: RUF012
    buckets = {"batch": (1, 8)}  # noqa: RUF012

    def run(self, sizes: dict[str, int], arrays: list[Any]) -> list[Any]:
        """Copies."""
        return [arrays[0].copy()]


def serve(on_loop: bool, pipe: Connection) -> None:
    """Run the server process until anything arrives through the pipe."""
    if on_loop:
        app.PIECE_BYTES = jsondata.PIECE_BYTES = jsondata._PIECE_ITEMS = 1 << 40
    with Server(Echo(), Options(port=0)) as server:
        pipe.send(server.address)
        pipe.recv()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, status: int = 200, count: int = 1
) -> None:
    """Send one or several requests at once, and read the answers."""
    writer.write(request)
    for _ in range(count):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        await reader.readexactly(int(head.lower().rpartition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0]))


def infer(body: bytes, fields: str = "") -> bytes:
    """A request."""
    head = f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n{fields}\r\n"
    return head.encode() + body


def large(rows: int) -> tuple[bytes, int]:
    """A request that is much work, and its expected status."""
    x = np.random.default_rng(0).standard_normal((rows, COLUMNS)).astype(np.float32)
    given = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    return infer(json.dumps({"inputs": [given]}).encode()), 200


MOST = Limits().max_body_bytes


def filled(text: str) -> bytes:
    """JSON of the maximum body size; the text in angle brackets is repeated."""
    start, unit, end = text.partition("<")[0], text.partition("<")[2].partition(">")[0], text.partition(">")[2]
    return (start + unit * ((MOST - len(start) - len(end)) // len(unit)) + end).encode()


def one_input(**changes: str) -> str:
    """JSON of a request of one row."""
    given = {"name": '"x"', "datatype": '"FP32"', "shape": f"[1, {COLUMNS}]", "data": "[1]"} | changes
    return '{"inputs": [{' + ", ".join(f'"{name}": {value}' for name, value in given.items()) + "}]}"


TINY = "256 KiB of tiny requests"
PIPELINED = (256 << 10) // len(SMALL)

# The text in angle brackets is repeated up to the maximum body size.
HOSTILE: dict[str, Callable[[], tuple[bytes, int]]] = {
    name: lambda text=text: (infer(gzip.compress(filled(text), 1), "Content-Encoding: gzip\r\n"), 400)
    for name, text in {
        "a shape of millions": one_input(shape="[<1,>1]"),
        "millions of inputs": '{"inputs": [<{"name": "x", "datatype": "FP32", "shape": [1]}, >{}]}',
        "millions of outputs": '{"outputs": [<{"name": "y"}, >{"name": "y"}], "inputs": []}',
        "millions of parameters": one_input(parameters='{<"a": 1, >"b": 1}'),
        "millions of unknown members": '{<"a": 1, >"inputs": []}',
        "deep nesting": "<[>",
        "data nested deep": one_input(data="[<[>]"),
        "data of empty lists": one_input(data="[<[],>[]]"),
        "data of millions of numbers": one_input(data="[<1,>1]"),
        "data of strings": one_input(data='[<"a",>"a"]'),
        "a number of millions of digits": one_input(data="[<1>]"),
        "a size of millions of digits": one_input(shape="[<1>]"),
        "white space": one_input(data="[< >1]"),
        "a long name": one_input(name='"<x>"'),
        "a long id": '{"id": "<x>", "inputs": []}',
        "a long id of escapes": '{"id": "<\\u00e9>", "inputs": []}',
        "backslashes": '{"id": "<\\\\>", "inputs": []}',
        "quotes": '{"id": <"">, "inputs": []}',
    }.items()
} | {
    "a bomb": lambda: (infer(gzip.compress(b"x" * 8 * MOST, 1), "Content-Encoding: gzip\r\n"), 413),
    "a short body of gzip members": lambda: (infer(gzip.compress(b"", 1) * 3000, "Content-Encoding: gzip\r\n"), 400),
    TINY: lambda: (SMALL * PIPELINED, 200),
    "a header of 16 KiB of commas": lambda: (infer(b"x", "Accept-Encoding: " + "," * 16_000 + "\r\n"), 400),
}


def send(
    make: Callable[..., tuple[bytes, int]] | str, arguments: tuple[Any, ...], count: int, pipe: Connection
) -> None:
    """Run the client of large requests; reports their size and the seconds of each."""
    request, status = (HOSTILE[make] if isinstance(make, str) else make)(*arguments)
    answers = PIPELINED if make == TINY else 1
    pipe.send(len(request))
    pipe.recv()

    async def main() -> list[float]:
        reader, writer = await asyncio.open_connection(*address_of(pipe), limit=1 << 20)
        seconds: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            await ask(reader, writer, request, status, answers)
            seconds.append(time.perf_counter() - start)
        writer.close()
        return seconds

    pipe.send(asyncio.run(main()))


def address_of(pipe: Connection) -> tuple[str, int]:
    """Receive the server's address."""
    return pipe.recv()


async def small_latencies(address: tuple[str, int], pipe: Connection) -> tuple[list[float], list[float]]:
    """Seconds of small requests while the other process sends large ones, and that process's results."""
    seconds: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(*address)
        while not pipe.poll():
            start = time.perf_counter()
            await ask(reader, writer, SMALL)
            seconds.append(time.perf_counter() - start)
            await asyncio.sleep(0.001)
        writer.close()

    pipe.send(address)
    await asyncio.gather(*(client() for _ in range(4)))
    return seconds, pipe.recv()


def measure(
    make: Any, arguments: tuple[Any, ...], count: int, *, on_loop: bool
) -> tuple[int, list[float], list[float]]:
    """The size of a large request, the seconds of small requests next to it, and its own seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(on_loop, there), daemon=True)
    server.start()
    address = here.recv()
    mine, theirs = context.Pipe()
    client = context.Process(target=send, args=(make, arguments, count, theirs), daemon=True)
    client.start()
    size = mine.recv()
    mine.send("ready")
    small, long = asyncio.run(small_latencies(address, mine))
    here.send("stop")
    client.join()
    server.join()
    return size, small, long


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10, help="large requests")
    parser.add_argument("--hostile", type=int, default=3, help="hostile requests of each kind; 0 for none")
    parser.add_argument("--only", help="run only hostile requests whose name contains this")
    options = parser.parse_args()
    for rows in () if options.only else (1, 16):
        for on_loop in (True, False):
            size, small, long = measure(large, (rows,), options.count, on_loop=on_loop)
            p50, p99, most = (1e3 * value for value in (*np.percentile(small, [50, 99]), max(small)))
            where = "on the event loop" if on_loop else "beside it"
            print(
                f"{size / 1e6:5.1f} MB read {where:17}: small p50 {p50:5.2f} ms, p99 {p99:6.1f} ms, "
                f"max {most:6.1f} ms; large {1e3 * float(np.median(long)):4.0f} ms",
                flush=True,
            )
    for name in HOSTILE if options.hostile else ():
        if options.only is None or options.only in name:
            size, small, long = measure(name, (), options.hostile, on_loop=False)
            print(
                f"{name:31} {size:10,} bytes sent: small max {1e3 * max(small):6.1f} ms, "
                f"done with after {1e3 * float(np.median(long)):5.0f} ms",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

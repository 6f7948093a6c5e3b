"""A client of several servers, one of which is five times slower than the others: its latency beside that of fast ones.

    python benchmarks/replicas.py [--seconds 8 | --quick]

Each server is a process that answers after a fixed time and does nothing else, so the figures are the client's: which
server gets a request, and when a slow one is left out. Fast ones take 4 ms, the slow one 20 ms; 4 threads ask as soon
as they are answered. Warm-up included: the client begins without knowing which server is slow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from typing import Any

import httptools
import numpy as np

from lepton_xla.cli.tables import Table, show
from lepton_xla.serve.client import Client

FAST_S, SLOWER, THREADS = 0.004, 5, 4
BODY = b'{"outputs": [{"name": "y", "datatype": "INT32", "shape": [1], "data": [7]}]}'
ANSWER = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY


class Delayed(asyncio.Protocol):
    """Answers every request with the same bytes, a fixed time after it came."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def connection_made(self, transport: Any) -> None:
        """A connection, and its parser."""
        self.transport, self.parser = transport, httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        """Parses."""
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answers, later."""
        asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, ANSWER)


async def answer(delay_s: float) -> None:
    """Listens, prints its port, runs until it is ended."""
    server = await asyncio.get_running_loop().create_server(lambda: Delayed(delay_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def servers(*delays_s: float) -> Any:
    """URLs of servers that answer after these times."""
    with contextlib.ExitStack() as stack:
        urls: list[str] = []
        for delay_s in delays_s:
            command = [sys.executable, __file__, "--answer-after-s", str(delay_s)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None
            urls.append(f"http://127.0.0.1:{int(process.stdout.readline())}")
        yield urls


def latencies(urls: list[str], seconds: float) -> np.ndarray:
    """Seconds of each request, sorted."""
    found: list[float] = []
    with Client(urls, model="m") as client:
        until = time.perf_counter() + seconds

        def ask() -> None:
            while (began := time.perf_counter()) < until:
                client.infer(x=[1.0])
                found.append(time.perf_counter() - began)

        threads = [threading.Thread(target=ask) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return np.sort(np.array(found))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="three seconds each")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--answer-after-s", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer_after_s is not None:
        asyncio.run(answer(options.answer_after_s))
        return
    seconds = 3.0 if options.quick else options.seconds
    slow_s = FAST_S * SLOWER
    cases = {
        "one fast": (FAST_S,),
        "one fast, one slow": (FAST_S, slow_s),
        "two fast, one slow": (FAST_S, FAST_S, slow_s),
        "one slow": (slow_s,),
    }
    rows: list[dict[str, Any]] = []
    for name, delays_s in cases.items():
        with servers(*delays_s) as urls:
            found = latencies(urls, seconds)
        p50, p99 = (float(np.percentile(found, at)) for at in (50, 99))
        rows.append({"servers": name, "requests": len(found), "p50_s": p50, "p99_s": p99})
        rows[-1]["p99_ratio"] = p99 / rows[0]["p99_s"]
    columns = ("servers", ">requests", ">p50 ms", ">p99 ms", ">p99 / one fast")
    figures = [(f"{row['p50_s'] * 1e3:.2f}", f"{row['p99_s'] * 1e3:.2f}", f"{row['p99_ratio']:.2f}") for row in rows]
    shown = [(row["servers"], row["requests"], *line) for row, line in zip(rows, figures, strict=True)]
    show(Table(f"{THREADS} threads, answers after {FAST_S * 1e3:g} ms or {slow_s * 1e3:g} ms", columns, shown))
    print("repeat with: python benchmarks/replicas.py")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"rows": rows}, file)


if __name__ == "__main__":
    main()

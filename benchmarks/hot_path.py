"""Time of each step of a one-row request inside the server, in one thread and without sockets.

    python benchmarks/hot_path.py [--at-once N] [--json FILE]

The model maps 784 numbers to 10. 64 connections (`--at-once`) receive a request each, then the batch runs. The server's
own objects are driven by hand, on a transport that discards its data. As many requests again find the queue full and
are rejected. `benchmarks/serving.py` measures requests with sockets and includes these results.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import harness
import payloads
import uvloop

import lepton_xla as lx
from lepton_xla.cli.tables import Table, show
from lepton_xla.serve.app.app import App
from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Costs
from lepton_xla.serve.batching.device import Device
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Scheduler
from lepton_xla.serve.http.connection import Connection
from lepton_xla.serve.http.response import Response
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import Decoder
from lepton_xla.serve.runtime import run_on_calling_thread, settle

AT_ONCE = 64
REFUSED = "or else, where the queue is full: refuse it, all in all"


class Nowhere:
    """A transport that counts writes and discards data."""

    def __init__(self) -> None:
        self.answers = 0

    def write(self, data: bytes) -> None:
        """Counts."""
        self.answers += 1

    def get_extra_info(self, name: str) -> Any:
        """Nobody."""
        return ("", 0)

    def is_closing(self) -> bool:
        """Never."""
        return False


class Held(Scheduler):
    """A scheduler that runs a batch only on request."""

    def _pump_soon(self) -> None:
        pass


class Timed(Engine[Any]):
    """An engine that sums the times of copying rows and executing."""

    copying = executing = 0.0

    def execute(self, batch: Any) -> Any:
        """One batch."""
        done = super().execute(batch)
        self.copying += done.staged_s - done.started_s
        self.executing += done.finished_s - done.staged_s
        return done


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def stages(
    path: pathlib.Path, payload: payloads.Payload, rounds: int = 400, at_once: int = AT_ONCE
) -> dict[str, float]:
    """Microseconds per request of each step, of all steps, and of a rejection: medians over rounds."""

    async def measured() -> dict[str, float]:
        model = lx.load(path)
        signature = signature_of(model)
        engine = Timed(model, signature)
        costs = Costs(signature.bucket_sizes, engine.warm_up())
        batcher, full = (
            Batcher[Any](signature.bucket_sizes, costs=costs, levels=3, max_rows=most) for most in (4096, at_once)
        )
        server, limits = ServerMetrics(), Limits()
        metrics = server.opened(signature.name, signature.version)
        loop = asyncio.get_running_loop()
        device = Device()
        scheduler, refusing = (
            Held(signature, queue, engine, metrics, loop, device, levels=3, cores=1) for queue in (batcher, full)
        )
        # Whatever it takes here, on this thread.
        scheduler._short = {(key, size) for key, size, _ in costs}
        scheduler._longest_s = 1.0
        held: list[Any] = []
        framing = ServerState(held.append, limits)
        whole, filling, over = (
            ServerState(App(Registry(ModelHandle(signature, each, metrics, limits)), server, limits), limits)
            for each in (scheduler, refusing, refusing)
        )
        decoder = Decoder(signature, limits, batcher.max_rows)
        body, fields = payload.oip()
        head = f"POST /v2/models/{payload.model}/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        data = (head + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n").encode() + body
        json_bytes = int(fields["Inference-Header-Content-Length"])
        answer = Response(200, b"Content-Length: 0\r\n\r\n", 21)
        connections: dict[int, list[Connection]] = {}
        for state in (framing, whole, filling, over):
            connections[id(state)] = [Connection(state) for _ in range(at_once)]
            for connection in connections[id(state)]:
                connection.connection_made(Nowhere())  # type: ignore[arg-type]

        def bring(state: ServerState) -> Callable[[], None]:
            def read() -> None:
                for connection in connections[id(state)]:
                    connection.data_received(data)

            return read

        def write() -> None:
            for exchange in held:
                exchange.send(answer, ())
            held.clear()

        def run() -> None:
            while batcher.pending:
                device.ask_again(scheduler.share)
                device._pump()

        def decode() -> None:
            for _ in range(at_once):
                decoder.decode(body, json_bytes)

        bring(filling)()
        found: list[dict[str, float]] = []
        for _ in range(rounds):
            framed, written, decoded = seconds_of(bring(framing)), seconds_of(write), seconds_of(decode)
            engine.copying = engine.executing = 0.0
            brought, ran = seconds_of(bring(whole)), seconds_of(run)
            found.append({
                "read one request of a connection": framed,
                "decode its body": decoded,
                "queue it": brought - framed - decoded,
                "copy its row into the batch": engine.copying,
                "execution": engine.executing,
                "form the batch, cut its result up, count": ran - engine.copying - engine.executing - written,
                "write the answer": written,
                REFUSED: seconds_of(bring(over)),
            })  # fmt: skip
        assert dict(server.all_codes()) == {200: rounds * at_once, 503: rounds * at_once}
        transport: Any = connections[id(whole)][0]._transport
        assert transport.answers == rounds
        steps = {step: 1e6 * statistics.median(each[step] for each in found) / at_once for step in found[0]}
        refused = steps.pop(REFUSED)
        return {**steps, "together": sum(steps.values()), REFUSED: refused}

    settle()
    return uvloop.run(measured())


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400, help="of so many requests each")
    parser.add_argument(
        "--at-once", type=int, default=AT_ONCE, help="requests in a batch; with 1 it shows what a batch costs by itself"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    run_on_calling_thread()  # as a server does, before anything uses JAX
    with tempfile.TemporaryDirectory() as folder:
        found = stages(
            *payloads.first10(pathlib.Path(folder), quick=False), rounds=options.rounds, at_once=options.at_once
        )
    rows = [(step, f"{micros:.1f}") for step, micros in found.items()]
    show(Table(f"784 numbers in, 10 out, {options.at_once} at once", ("step", ">µs a request"), rows))
    harness.write_json(options.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
